//! The CR as a projection of its row.

use serde_json::{Map, Value};

use super::{Action, Desktop};
use crate::crd::CyberdeskSpec;

impl Desktop<'_> {
    /// The row's CR, as the row wants it. A CR by hand is its owner's.
    pub(super) fn project(&self) -> Vec<Action> {
        let Some(row) = self.row else { return vec![] };
        let owner = (row.id, row.user_id);
        let spec = CyberdeskSpec {
            timeout_ms: None,
            expires_at: Some(row.timeout_at),
            params: row.params.as_ref().and_then(Value::as_object).cloned(),
        };
        match self.cr {
            None => vec![Action::CreateCr { owner, spec }],
            // It comes back when it is gone.
            Some(cr) if cr.deleting => vec![],
            Some(cr) => {
                let same = cr.owner.as_ref() == Some(&self.owner)
                    && cr.spec.as_ref().is_ok_and(|seen| {
                        seen.expires_at == spec.expires_at && same_params(&seen.params, &spec.params)
                    });
                if same { vec![] } else { vec![Action::ApplyCr { uid: cr.uid.clone(), owner, spec }] }
            }
        }
    }
}

/// Whether the API server has these params. It keeps a number as an int64 or a float64, whichever has its value: 4.0
/// comes back as 4, and what no int64 holds as the nearest float64 (`k8s.io/apimachinery`, serializer/json).
fn same_params(seen: &Option<Map<String, Value>>, wanted: &Option<Map<String, Value>>) -> bool {
    match (seen, wanted) {
        (Some(seen), Some(wanted)) => same_object(seen, wanted),
        (seen, wanted) => seen.is_none() && wanted.is_none(),
    }
}

fn same_object(one: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    one.len() == other.len() && one.iter().all(|(key, value)| other.get(key).is_some_and(|it| same_value(value, it)))
}

fn same_value(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one == other || one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same_value(one, other))
        }
        (Value::Object(one), Value::Object(other)) => same_object(one, other),
        (one, other) => one == other,
    }
}
