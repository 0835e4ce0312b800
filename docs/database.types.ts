// The types of schema public as this project's migrations make it: a test compares them with the database.

export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  public: {
    Tables: {
      cyberdesk_instances: {
        Row: {
          created_at: string | null
          ended_at: string | null
          id: string
          message: string | null
          params: Json | null
          reason: string | null
          shutdown_requested_at: string | null
          status: Database['public']['Enums']['instance_status']
          stream_url: string | null
          timeout_at: string
          updated_at: string | null
          user_id: string
          warned_at: string | null
        }
        Insert: {
          created_at?: string | null
          ended_at?: string | null
          id?: string
          message?: string | null
          params?: Json | null
          reason?: string | null
          shutdown_requested_at?: string | null
          status?: Database['public']['Enums']['instance_status']
          stream_url?: string | null
          timeout_at?: string
          updated_at?: string | null
          user_id: string
          warned_at?: string | null
        }
        Update: {
          created_at?: string | null
          ended_at?: string | null
          id?: string
          message?: string | null
          params?: Json | null
          reason?: string | null
          shutdown_requested_at?: string | null
          status?: Database['public']['Enums']['instance_status']
          stream_url?: string | null
          timeout_at?: string
          updated_at?: string | null
          user_id?: string
          warned_at?: string | null
        }
        Relationships: []
      }
    }
    Views: {
      cyberdesk_desktop_history: {
        Row: {
          actor: string | null
          actor_role: string | null
          actor_sub: string | null
          at: string | null
          desktop_id: string | null
          event: string | null
          from_status: Database['public']['Enums']['instance_status'] | null
          id: number | null
          reason: string | null
          timeout_at: string | null
          to_status: Database['public']['Enums']['instance_status'] | null
        }
        Relationships: []
      }
    }
    Functions: {
      desktop_service_state: {
        Args: never
        Returns: { braked: boolean; message: string; paused: boolean; seen_at: string; served: boolean; state: string }[]
      }
      extend_desktop: {
        Args: { by_interval: unknown; desktop_id: string }
        Returns: { changed: boolean; desktop: Database['public']['Tables']['cyberdesk_instances']['Row'] }[]
      }
      request_shutdown: {
        Args: { desktop_id: string; reason?: string }
        Returns: { changed: boolean; desktop: Database['public']['Tables']['cyberdesk_instances']['Row'] }[]
      }
      request_shutdown_all: {
        Args: { owner_id?: string }
        Returns: { changed: boolean; desktop: Database['public']['Tables']['cyberdesk_instances']['Row'] }[]
      }
      set_desktop_timeout: {
        Args: { at: string; desktop_id: string }
        Returns: { changed: boolean; desktop: Database['public']['Tables']['cyberdesk_instances']['Row'] }[]
      }
      touch_desktop: {
        Args: { desktop_id: string }
        Returns: { changed: boolean; desktop: Database['public']['Tables']['cyberdesk_instances']['Row'] }[]
      }
    }
    Enums: {
      instance_status: 'pending' | 'running' | 'completed' | 'error' | 'terminated'
    }
    CompositeTypes: { [_ in never]: never }
  }
}

export type Tables<Name extends keyof Database['public']['Tables']> = Database['public']['Tables'][Name]['Row']
export type Enums<Name extends keyof Database['public']['Enums']> = Database['public']['Enums'][Name]
