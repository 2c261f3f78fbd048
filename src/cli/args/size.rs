//! Sizes, as people write them.

/// A number with a unit, as bytes.
///
/// # Errors
/// What is accepted instead.
pub(super) fn size(text: &str) -> Result<u64, &'static str> {
    const ACCEPTED: &str = "accepted: a number with B, KiB, MiB, GiB or TiB, as in 50GiB";
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let unit = match unit.trim() {
        "B" => 1_u64,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(ACCEPTED),
    };
    let number: f64 = number.parse().map_err(|_| ACCEPTED)?;
    Ok((number * unit as f64) as u64)
}
