//! The filter language of containerd's list requests.
//!
//! A filter is a comma-separated list of selectors that must all match; a request may bring several filters, of which one
//! must match. A selector is a field path (`kind`, `name`, `parent`, `labels.x`, `labels."a.b"`), alone (is it there?) or
//! with `==`, `!=` or `~=` (regular expression) and a value. Field names and values can be quoted like Go strings; the
//! value of `~=` also between `/` or `|`, so that a pattern may contain quotes. Where the rules are odd (white space
//! is allowed before operators and values but not after; a pattern that cannot be compiled matches nothing), they are
//! those of containerd.

use regex::{Regex, RegexBuilder};

mod scan;

use scan::{Scanner, Token};

/// Longest filter in bytes.
pub const MAX_FILTER: usize = 16 << 10;
/// Most filters in one request.
pub const MAX_FILTERS: usize = 64;
/// Memory that one compiled pattern may take, in bytes.
const MAX_PATTERN: usize = 1 << 20;

/// A filter that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {input:?}, byte {position}: {message}")]
pub struct FilterError {
    /// The filter.
    pub input: String,
    /// Byte offset of what is wrong.
    pub position: usize,
    /// What is wrong.
    pub message: String,
}

/// Where a filter finds the fields of an object.
pub trait Fields {
    /// The value at `path`; none if the object has no such field.
    fn field(&self, path: &[String]) -> Option<&str>;
}

/// Parsed filters of one request.
#[derive(Debug, Clone, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// None for a pattern that cannot be compiled.
    Matches(Option<Regex>),
}

impl Filters {
    /// Parses the filters of a request. No filter at all, or an empty one, matches everything.
    ///
    /// # Errors
    /// [`FilterError`] for the first filter that cannot be read, or when there are too many or too long ones.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, FilterError> {
        let refuse = |input: &str, message: String| FilterError { input: input.to_owned(), position: 0, message };
        if filters.len() > MAX_FILTERS {
            return Err(refuse("", format!("more than {MAX_FILTERS} filters")));
        }
        filters
            .iter()
            .map(|filter| match filter.as_ref() {
                "" => Ok(Vec::new()),
                long if long.len() > MAX_FILTER => Err(refuse("", format!("longer than {MAX_FILTER} bytes"))),
                filter => Parser { scanner: Scanner::new(filter) }.selectors(),
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether one of the filters matches `object`.
    pub fn matches(&self, object: &impl Fields) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.matches(object)))
    }
}

impl Selector {
    fn matches(&self, object: &impl Fields) -> bool {
        let value = object.field(&self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            // As in containerd, a missing field has the empty value here.
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(pattern) => {
                pattern.as_ref().is_some_and(|pattern| pattern.is_match(value.unwrap_or_default()))
            }
        }
    }
}

struct Parser<'a> {
    scanner: Scanner<'a>,
}

impl Parser<'_> {
    fn selectors(mut self) -> Result<Vec<Selector>, FilterError> {
        let mut selectors = vec![self.selector()?];
        loop {
            match self.scanner.peek() {
                None => return Ok(selectors),
                Some(',') => {
                    self.scanner.token()?;
                    selectors.push(self.selector()?);
                }
                Some(other) => return Err(self.scanner.error(format!("unexpected {other:?}"))),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.field()?];
        while self.scanner.peek() == Some('.') {
            self.scanner.token()?;
            path.push(self.field()?);
        }
        if matches!(self.scanner.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Test::Present });
        }
        let test = match self.scanner.token()? {
            Token::Operator("==") => Test::Equal(self.value(false)?),
            Token::Operator("!=") => Test::NotEqual(self.value(false)?),
            Token::Operator("~=") => {
                let pattern = self.value(true)?;
                Test::Matches(RegexBuilder::new(&pattern).size_limit(MAX_PATTERN).build().ok())
            }
            other => return Err(self.scanner.error(format!("expected ==, != or ~=, found {other}"))),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        match self.scanner.token()? {
            Token::Field(name) => Ok(name.to_owned()),
            Token::Quoted { quote: '"', text } => Ok(text),
            other => Err(self.scanner.error(format!("expected a field name, found {other}"))),
        }
    }

    fn value(&mut self, any_quote: bool) -> Result<String, FilterError> {
        match self.scanner.token()? {
            Token::Value(text) => Ok(text.to_owned()),
            Token::Quoted { quote, text } if any_quote || quote == '"' => Ok(text),
            other => Err(self.scanner.error(format!("expected a value, found {other}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    struct Object(BTreeMap<String, String>);

    impl Fields for Object {
        fn field(&self, path: &[String]) -> Option<&str> {
            self.0.get(&path.join("/")).map(String::as_str)
        }
    }

    fn object() -> Object {
        let fields = [
            ("name", "k8s.io/12/sha256:ab"),
            ("kind", "committed"),
            ("parent", ""),
            ("labels/containerd.io/snapshot.ref", "sha256:ab"),
            ("labels/odd \"label\"", "x,y"),
            ("labels/path", "/a/b"),
            ("labels/umlaut", "größe"),
        ];
        Object(fields.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    fn matches(filters: &[&str]) -> Result<bool, FilterError> {
        Ok(Filters::parse(filters)?.matches(&object()))
    }

    #[test]
    fn what_matches() {
        let cases: &[(&str, bool)] = &[
            ("", true),
            ("kind==committed", true),
            ("kind==active", false),
            ("kind!=active", true),
            ("name==k8s.io/12/sha256:ab", true),
            ("parent==\"\"", true),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\"", true),
            ("labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"x\"", false),
            ("labels.\"containerd.io/snapshot.ref\"", true),
            ("labels.absent", false),
            ("labels.absent==x", false),
            ("labels.absent!=x", true),
            ("labels.\"odd \\\"label\\\"\"==\"x,y\"", true),
            ("labels.\"odd \\x22label\\042\"==\"x\\u002cy\"", true),
            ("labels.umlaut==größe", true),
            ("labels.umlaut==\"gr\\u00f6\\xc3\\x9fe\"", true),
            ("labels.path~=/^\\/a\\/b$/", true),
            ("labels.path~=|^/a/|", true),
            ("labels.path~=\"^/b\"", false),
            ("name~=sha256:[a-f]+$", true),
            ("name~=(", false),
            ("labels.absent~=^$", true),
            ("kind == committed, parent", true),
        ];
        for (filter, expected) in cases {
            assert_eq!(matches(&[filter]), Ok(*expected), "{filter}");
        }
    }

    #[test]
    fn several_filters_are_alternatives() {
        assert_eq!(matches(&["kind==active", "kind==committed"]), Ok(true));
        assert_eq!(matches(&["kind==active", "kind==view"]), Ok(false));
        assert_eq!(matches(&["kind==active", ""]), Ok(true));
        assert_eq!(matches(&[]), Ok(true));
    }

    #[test]
    fn what_cannot_be_read() {
        let bad = [
            ",",
            "kind==",
            "kind=committed",
            "kind===committed",
            "kind==a b",
            "kind==a ",
            "kind ",
            ".kind",
            "kind.",
            "kind==committed,",
            "kind==\"open",
            "kind==\"bad\\q\"",
            "kind==\"\\x4\"",
            "kind==\"\\xff\"",
            "name==/a/b",
            "name==|a|",
            "/kind/==a",
            "kind==\"a\"b",
            "kind==\"line\nbreak\"",
            "kind=\0=a",
            "name==\"\\U00110000\"",
            "kind==,b",
        ];
        for filter in bad {
            assert!(matches(&[filter]).is_err(), "{filter:?} was read");
        }
        assert!(matches(&vec!["kind"; MAX_FILTERS + 1]).is_err());
        assert!(matches(&["k".repeat(MAX_FILTER + 1).as_str()]).is_err());
    }

    #[test]
    fn errors_say_where() {
        let error = matches(&["kind==a,name=b"]).unwrap_err();
        assert_eq!(error.position, 12);
        assert_eq!(error.input, "kind==a,name=b");
    }

    /// Go's `%q` for text that prints, which is how containerd quotes a parent in its own queries.
    fn go_quote(text: &str) -> String {
        let mut quoted = String::from('"');
        for character in text.chars() {
            match character {
                '"' | '\\' => quoted.extend(['\\', character]),
                '\n' => quoted.push_str("\\n"),
                control if u32::from(control) < 0x80 && control.is_control() => {
                    quoted.push_str(&format!("\\x{:02x}", u32::from(control)));
                }
                other => quoted.push(other),
            }
        }
        quoted + "\""
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn any_quoted_name_finds_itself(name in "[^\0]{0,40}") {
            let object = Object(BTreeMap::from([("name".to_owned(), name.clone())]));
            let filter = format!("name=={}", go_quote(&name));
            prop_assert!(Filters::parse(&[filter]).unwrap().matches(&object));
        }

        #[test]
        fn nothing_panics(filter in "[a-z.,=!~\"/|\\\\ x0-9]{0,30}|\\PC{0,20}") {
            if let Ok(filters) = Filters::parse(&[filter]) {
                filters.matches(&object());
            }
        }
    }
}
