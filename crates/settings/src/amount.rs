//! Durations and sizes as text: `"30s"`, `"64MiB"`. Plain numbers are refused: nobody knows of what.

/// For `#[serde(with = "amount::duration")]` on a [`std::time::Duration`]: `"90s"`, `"2m"`, `"1h 30m"`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de};

    /// Reads text such as `"30s"`.
    ///
    /// # Errors
    /// When the value is no text, or no duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        let refuse = |error| de::Error::custom(format!("{text:?} is not a duration such as \"30s\": {error}"));
        humantime::parse_duration(&text).map_err(refuse)
    }

    /// Writes the text that [`deserialize`] reads.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }
}

/// For `#[serde(with = "amount::size")]` on a `u64` of bytes: a whole number with the unit B, KiB, MiB or GiB.
pub mod size {
    use serde::{Deserialize, Deserializer, Serializer, de};

    /// Largest first.
    const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

    /// Reads text such as `"64MiB"`.
    ///
    /// # Errors
    /// When the value is no text, has no unit, or does not fit into a `u64`.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let refuse = || de::Error::custom(format!("{text:?} is not a size such as \"64MiB\" (B, KiB, MiB, GiB)"));
        parse(&text).ok_or_else(refuse)
    }

    /// Writes the text that [`deserialize`] reads.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format(*bytes))
    }

    pub(crate) fn parse(text: &str) -> Option<u64> {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = text.split_at(digits);
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit.trim_start())?;
        number.parse::<u64>().ok()?.checked_mul(*factor)
    }

    /// In the largest unit that leaves a whole number.
    pub(super) fn format(bytes: u64) -> String {
        let fits = |factor: u64| bytes >= factor && bytes.is_multiple_of(factor);
        let (unit, factor) = UNITS.into_iter().find(|(_, factor)| fits(*factor)).unwrap_or(("B", 1));
        format!("{}{unit}", bytes / factor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::size;

    #[test]
    fn sizes_have_a_unit_and_fit() {
        for (text, bytes) in [
            ("0B", Some(0)),
            ("3 KiB", Some(3072)),
            ("2GiB", Some(2 << 30)),
            ("5", None),
            ("MiB", None),
            ("64MB", None),
            ("-1B", None),
            ("99999999999GiB", None),
        ] {
            assert_eq!(size::parse(text), bytes, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(bytes: u64) {
            prop_assert_eq!(size::parse(&size::format(bytes)), Some(bytes));
        }
    }
}
