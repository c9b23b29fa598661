//! Lists inside one field of a record: entries separated by spaces, free text in percent escapes so that it contains
//! none. Owns the form of stages, labels and service levels there, and parsing it. Never: the fields that contain them.

use std::str::FromStr;

use proto_msgs::{
    LabelRule, ModelRef, Slo, Stage,
    limits::{RULES_MAX, STAGES_AFTER_MAX},
};

/// Later stages as text: `name:digest:bytes:format`, in order.
pub(super) fn stages_text(stages: &[Stage]) -> String {
    let entry = |stage: &Stage| {
        let ModelRef { digest, size_bytes, format } = stage.model;
        format!("{}:{digest}:{size_bytes}:{format}", escaped(&stage.name))
    };
    stages.iter().map(entry).collect::<Vec<_>>().join(" ")
}

/// Parses stages; `None` if the text is not a list of stages.
pub(super) fn stages(text: &str) -> Option<Vec<Stage>> {
    let entry = |text: &str| {
        let mut parts = text.split(':');
        let name = unescaped(parts.next()?)?;
        let digest = parsed(parts.next()?)?;
        let (size_bytes, format) = (parsed(parts.next()?)?, parsed(parts.next()?)?);
        parts.next().is_none().then_some(Stage { name, model: ModelRef { digest, size_bytes, format } })
    };
    let stages: Vec<Stage> = text.split_ascii_whitespace().map(entry).collect::<Option<_>>()?;
    (stages.len() <= STAGES_AFTER_MAX).then_some(stages)
}

/// Label rules as text: `require:key=value` or `prefer:key=value`.
pub(super) fn labels_text(rules: &[LabelRule]) -> String {
    let entry = |rule: &LabelRule| {
        let wish = if rule.required { "require" } else { "prefer" };
        format!("{wish}:{}={}", escaped(&rule.key), escaped(&rule.value))
    };
    rules.iter().map(entry).collect::<Vec<_>>().join(" ")
}

/// Parses label rules; `None` if the text is not a list of rules.
pub(super) fn labels(text: &str) -> Option<Vec<LabelRule>> {
    let entry = |text: &str| {
        let (wish, rule) = text.split_once(':')?;
        let (key, value) = rule.split_once('=')?;
        let required = match wish {
            "require" => true,
            "prefer" => false,
            _ => return None,
        };
        Some(LabelRule { key: unescaped(key)?, value: unescaped(value)?, required })
    };
    let rules: Vec<LabelRule> = text.split_ascii_whitespace().map(entry).collect::<Option<_>>()?;
    (rules.len() <= RULES_MAX).then_some(rules)
}

/// A service level as text: `latency_ms:permille`, empty for none.
pub(super) fn slo_text(slo: Option<Slo>) -> String {
    slo.map(|slo| format!("{}:{}", slo.latency_ms, slo.max_violation_permille)).unwrap_or_default()
}

/// Parses a service level. The outer `None` means that the text is neither empty nor a service level.
pub(super) fn slo(text: &str) -> Option<Option<Slo>> {
    if text.is_empty() {
        return Some(None);
    }
    let (latency, permille) = text.split_once(':')?;
    Some(Some(Slo { latency_ms: parsed(latency)?, max_violation_permille: parsed(permille)? }))
}

fn parsed<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

/// Escapes everything but letters, digits, dots, dashes and underscores as `%xx`.
fn escaped(text: &str) -> String {
    let one = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' => char::from(byte).to_string(),
        other => format!("%{other:02x}"),
    };
    text.bytes().map(one).collect()
}

fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut parts = text.split('%');
    bytes.extend_from_slice(parts.next()?.as_bytes());
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}
