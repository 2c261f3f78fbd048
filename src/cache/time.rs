//! Times as Go writes them in JSON.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use time::macros::utc_datetime;
use time::{Date, Duration, Month, OffsetDateTime, UtcOffset};

use crate::quote::quoted;

/// A time as Go writes it in JSON: RFC 3339, UTC, nanoseconds without trailing zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub OffsetDateTime);

/// Why a text is not a [`Time`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidTime(String);

impl fmt::Display for InvalidTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is not a time (expected RFC 3339, years 0 to 9999)",
            quoted(&self.0)
        )
    }
}

impl std::error::Error for InvalidTime {}

impl Time {
    /// Go's zero time, which stands for an unknown time.
    pub const UNKNOWN: Time = Time(utc_datetime!(0001-01-01 0:00).to_offset(UtcOffset::UTC));

    pub fn is_unknown(&self) -> bool {
        *self == Self::UNKNOWN
    }
}

impl Default for Time {
    fn default() -> Self {
        Self::UNKNOWN
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.0.checked_to_offset(UtcOffset::UTC).unwrap_or(self.0);
        let (date, clock) = (time.date(), time.time());
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
            date.year(),
            u8::from(date.month()),
            date.day(),
            clock.hour(),
            clock.minute(),
            clock.second()
        )?;
        if clock.nanosecond() != 0 {
            let nanoseconds = format!("{:09}", clock.nanosecond());
            write!(f, ".{}", nanoseconds.trim_end_matches('0'))?;
        }
        f.write_str("Z")
    }
}

impl FromStr for Time {
    type Err = InvalidTime;

    /// Accepts any offset and converts to UTC; digits beyond nanoseconds are cut off.
    fn from_str(text: &str) -> Result<Self, InvalidTime> {
        parse(text).ok_or_else(|| InvalidTime(text.chars().take(101).collect()))
    }
}

/// By hand: Go is stricter than most parsers (`T` and `Z` in upper case, no leap seconds).
fn parse(text: &str) -> Option<Time> {
    let mut rest = text.as_bytes();
    let year = digits(&mut rest, 4)?;
    byte(&mut rest, b'-')?;
    let month = digits(&mut rest, 2)?;
    byte(&mut rest, b'-')?;
    let day = digits(&mut rest, 2)?;
    byte(&mut rest, b'T')?;
    let hour = digits(&mut rest, 2)?;
    byte(&mut rest, b':')?;
    let minute = digits(&mut rest, 2)?;
    byte(&mut rest, b':')?;
    let second = digits(&mut rest, 2)?;

    let mut nanosecond = 0;
    if byte(&mut rest, b'.').is_some() {
        let length = rest.iter().take_while(|c| c.is_ascii_digit()).count();
        let (fraction, after) = rest.split_at_checked(length)?;
        let mut digits = fraction.iter().map(|c| u32::from(c - b'0'));
        digits.len().checked_sub(1)?;
        for _ in 0..9 {
            nanosecond = nanosecond * 10 + digits.next().unwrap_or(0);
        }
        rest = after;
    }

    let mut offset = Duration::ZERO;
    if byte(&mut rest, b'Z').is_none() {
        let (sign, after) = rest.split_first()?;
        rest = after;
        let hours = digits(&mut rest, 2)?;
        byte(&mut rest, b':')?;
        let minutes = digits(&mut rest, 2)?;
        if hours > 23 || minutes > 59 {
            return None;
        }
        offset = Duration::minutes(i64::from(hours * 60 + minutes));
        match sign {
            b'+' => {}
            b'-' => offset = -offset,
            _ => return None,
        }
    }
    if !rest.is_empty() {
        return None;
    }

    let month = Month::try_from(u8::try_from(month).ok()?).ok()?;
    let date = Date::from_calendar_date(year.into(), month, u8::try_from(day).ok()?).ok()?;
    let local = date
        .with_hms_nano(
            u8::try_from(hour).ok()?,
            u8::try_from(minute).ok()?,
            u8::try_from(second).ok()?,
            nanosecond,
        )
        .ok()?;
    let time = local.checked_sub(offset)?;
    // Go cannot write other years; an offset must not lead there either.
    (0..=9999)
        .contains(&time.year())
        .then(|| Time(time.assume_utc()))
}

fn digits(rest: &mut &[u8], count: usize) -> Option<u16> {
    let (number, after) = rest.split_at_checked(count)?;
    let mut value = 0u16;
    for c in number {
        if !c.is_ascii_digit() {
            return None;
        }
        value = value.checked_mul(10)?.checked_add(u16::from(c - b'0'))?;
    }
    *rest = after;
    Some(value)
}

fn byte(rest: &mut &[u8], expected: u8) -> Option<()> {
    let (first, after) = rest.split_first()?;
    (*first == expected).then(|| *rest = after)
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_written_as_go_writes_them_in_utc() {
        for (text, expected) in [
            (
                "2026-11-21T20:37:36.959076185Z",
                "2026-11-21T20:37:36.959076185Z",
            ),
            ("2026-11-21T20:37:36.500000000Z", "2026-11-21T20:37:36.5Z"),
            ("2026-11-21T20:37:36.000Z", "2026-11-21T20:37:36Z"),
            (
                "2026-11-21T20:37:36.0000000019Z",
                "2026-11-21T20:37:36.000000001Z",
            ),
            ("2026-11-21T20:37:36+02:30", "2026-11-21T18:07:36Z"),
            ("2026-12-31T23:37:36.1-01:00", "2027-01-01T00:37:36.1Z"),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
            ("0000-01-01T00:00:00Z", "0000-01-01T00:00:00Z"),
            (
                "9999-12-31T23:59:59.999999999Z",
                "9999-12-31T23:59:59.999999999Z",
            ),
        ] {
            assert_eq!(text.parse::<Time>().unwrap().to_string(), expected);
        }
    }

    #[test]
    fn only_gos_zero_time_is_unknown() {
        assert!("0001-01-01T00:00:00Z".parse::<Time>().unwrap().is_unknown());
        assert!(
            "0001-01-01T01:00:00+01:00"
                .parse::<Time>()
                .unwrap()
                .is_unknown()
        );
        assert!(!"0001-01-01T00:00:01Z".parse::<Time>().unwrap().is_unknown());
    }

    #[test]
    fn what_go_refuses_is_refused() {
        for text in [
            "",
            "2026-11-21",
            "2026-11-21 20:37:36Z",
            "2026-11-21t20:37:36Z",
            "2026-11-21T20:37:36z",
            "2026-11-21T20:37:36",
            "2026-11-21T20:37:36.Z",
            "2026-11-21T20:37:36,5Z",
            "2026-11-21T20:37:60Z",
            "2026-11-21T24:00:00Z",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-11-21T20:37:36+24:00",
            "2026-11-21T20:37:36+01:60",
            "2026-11-21T20:37:36+0100",
            "2026-11-21T20:37:36ZZ",
            "+026-11-21T20:37:36Z",
            "12026-11-21T20:37:36Z",
            "0000-01-01T00:00:00+01:00",
            "9999-12-31T23:59:59-01:00",
            "２026-11-21T20:37:36Z",
        ] {
            assert!(text.parse::<Time>().is_err(), "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[0-9TZ:.+\\-\\PC]{0,40}") {
            let _ = text.parse::<Time>();
        }

        #[test]
        fn what_was_written_reads_back_equal(
            seconds in -62_167_219_200i64..=253_402_300_799,
            nanosecond in 0i64..1_000_000_000,
        ) {
            let time = OffsetDateTime::from_unix_timestamp(seconds).unwrap()
                + Duration::nanoseconds(nanosecond);
            prop_assert_eq!(Time(time).to_string().parse(), Ok(Time(time)));
        }
    }
}
