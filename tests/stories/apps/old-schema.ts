// The table as the app knew it before: seven columns, and nothing of what this project adds.
import { sql } from 'drizzle-orm'
import { pgEnum, pgTable, timestamp, uuid, varchar } from 'drizzle-orm/pg-core'
import { authUsers } from 'drizzle-orm/supabase'
export const instanceStatus = pgEnum('instance_status', ['pending', 'running', 'completed', 'error', 'terminated'])
export const cyberdeskInstances = pgTable('cyberdesk_instances', {
  id: uuid('id').primaryKey().defaultRandom().notNull(),
  userId: uuid('user_id').notNull().references(() => authUsers.id, { onDelete: 'cascade' }),
  createdAt: timestamp('created_at').defaultNow(),
  updatedAt: timestamp('updated_at'),
  status: instanceStatus('status').notNull().default('pending'),
  timeoutAt: timestamp('timeout_at').notNull().default(sql`now() + interval '24 hours'`),
  streamUrl: varchar('stream_url', { length: 1024 }),
})
