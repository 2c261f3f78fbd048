//! Makes text from outside (the network, a file, the command line) fit for a message: it must not
//! steer the terminal that shows it, end the line, or flood the screen.

use std::borrow::Cow;

/// Characters that [`quoted`] shows.
const QUOTED: usize = 100;

/// Characters that [`one_line`] keeps.
pub const ONE_LINE: usize = 200;

/// `text` with every character escaped that could move the cursor, change colours or reorder what is
/// read. For names that are shown whole, such as keys.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unprintable) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unprintable(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// Control characters, line and paragraph separators, and the marks that turn the writing direction.
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` in double quotes, escaped, and cut after 100 characters. For values whose beginning and end matter.
pub fn quoted(text: &str) -> String {
    let end = text.char_indices().nth(QUOTED).map(|(at, _)| at);
    match end.and_then(|end| text.get(..end)) {
        Some(start) => format!("{start:?}…"),
        None => format!("{text:?}"),
    }
}

/// The words of `text` on one line, without control characters, and cut after [`ONE_LINE`]
/// characters. For sentences that someone else wrote.
pub fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || is_unprintable(c)) {
        if word.is_empty() {
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if line.len() > 4 * ONE_LINE {
            break;
        }
    }
    if let Some((end, _)) = line.char_indices().nth(ONE_LINE) {
        line.truncate(end);
        line.push('…');
    }
    line
}

/// The first `most` of `items` on one line, and how many more there are.
pub fn first_few(items: impl IntoIterator<Item: ToString>, most: usize) -> String {
    let mut items = items.into_iter();
    let mut shown: Vec<_> = items
        .by_ref()
        .take(most)
        .map(|item| item.to_string())
        .collect();
    match items.count() {
        0 => {}
        more => shown.push(format!("and {more} more")),
    }
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_list_the_first_few_are_shown() {
        assert_eq!(first_few(["a", "b"], 2), "a, b");
        assert_eq!(first_few(1..=5, 2), "1, 2, and 3 more");
    }

    #[test]
    fn what_could_steer_a_terminal_is_escaped_and_the_rest_stays() {
        assert_eq!(
            printable("tag \x1b[2J\r\nfake \u{9b}0m \u{202e}gpj ✓ näme"),
            "tag \\u{1b}[2J\\r\\nfake \\u{9b}0m \\u{202e}gpj ✓ näme"
        );
        assert!(matches!(printable("plain"), Cow::Borrowed("plain")));
    }

    #[test]
    fn a_quoted_value_shows_its_start() {
        assert_eq!(quoted("a \"b\"\n"), r#""a \"b\"\n""#);
        assert_eq!(quoted("\u{202e}"), r#""\u{202e}""#);
        assert_eq!(quoted(&"ä".repeat(100)), format!("\"{}\"", "ä".repeat(100)));
        assert_eq!(
            quoted(&"ä".repeat(101)),
            format!("\"{}\"…", "ä".repeat(100))
        );
    }

    #[test]
    fn a_sentence_from_elsewhere_becomes_one_short_line() {
        assert_eq!(one_line(" a\tb\n\n\u{9b}c "), "a b c");
        let long = one_line(&"é\n".repeat(1000));
        assert_eq!(long.chars().count(), ONE_LINE + 1);
        assert!(long.ends_with("é é …"), "{long}");
        assert_eq!(one_line(&"x".repeat(ONE_LINE)), "x".repeat(ONE_LINE));
    }
}
