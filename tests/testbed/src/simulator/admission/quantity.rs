//! Kubernetes' quantities (`512Mi`, `0.5`, `1e3`), as far as rules compare them.

use serde_json::Value;

/// The value in thousandths; nothing for what is absent or not a quantity.
pub(super) fn milli(value: &Value) -> Option<i128> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let factor: f64 = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1_048_576.0,
        "Gi" => 1_073_741_824.0,
        "Ti" => 1_099_511_627_776.0,
        "Pi" => 1_125_899_906_842_624.0,
        "Ei" => 1_152_921_504_606_846_976.0,
        exponent => 10f64.powi(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a rule compares sizes; beyond 2^53 a rounding does not matter"
    )]
    let milli = (number.parse::<f64>().ok()? * factor * 1000.0).round() as i128;
    Some(milli)
}

/// How a quantity is written in a message: as it stands, `0` if absent.
pub(super) fn written(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "0".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_what_kubernetes_writes() {
        let table = [
            ("1", 1000),
            ("500m", 500),
            ("1Ki", 1_024_000),
            ("1.5G", 1_500_000_000_000),
            ("-1", -1000),
            ("1e3", 1_000_000),
        ];
        for (text, expected) in table {
            assert_eq!(milli(&json!(text)), Some(expected), "{text}");
        }
        assert_eq!(milli(&json!(2)), Some(2000));
        assert_eq!(milli(&json!("x")), None);
    }
}
