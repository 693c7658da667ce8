//! Tokens of the filter language, and Go's rules for quoted text.

use std::fmt;

use super::FilterError;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Token<'a> {
    End,
    Separator(char),
    Operator(&'a str),
    Field(&'a str),
    Value(&'a str),
    /// Text without its quotes, escapes resolved.
    Quoted {
        quote: char,
        text: String,
    },
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => write!(out, "the end"),
            Self::Separator(separator) => write!(out, "{separator:?}"),
            Self::Operator(text) | Self::Field(text) | Self::Value(text) => write!(out, "{text:?}"),
            Self::Quoted { quote, text } => write!(out, "{text:?} between {quote}"),
        }
    }
}

/// Splits a filter into tokens. After an operator, everything up to a comma or white space is a value.
pub(super) struct Scanner<'a> {
    input: &'a str,
    position: usize,
    /// Start of the latest token, for errors.
    start: usize,
    value_next: bool,
}

impl<'a> Scanner<'a> {
    pub(super) const fn new(input: &'a str) -> Self {
        Self { input, position: 0, start: 0, value_next: false }
    }

    /// The next character, which stays.
    pub(super) fn peek(&self) -> Option<char> {
        self.input.get(self.position..)?.chars().next()
    }

    /// An error at the latest token.
    pub(super) fn error(&self, message: String) -> FilterError {
        FilterError { input: self.input.to_owned(), position: self.start, message }
    }

    pub(super) fn token(&mut self) -> Result<Token<'a>, FilterError> {
        self.skip(char::is_whitespace);
        self.start = self.position;
        let Some(first) = self.peek() else { return Ok(Token::End) };
        match first {
            '"' | '/' | '|' => self.quoted(first),
            ',' | '.' => {
                self.bump();
                self.value_next = false;
                Ok(Token::Separator(first))
            }
            '=' | '!' | '~' => {
                self.value_next = true;
                Ok(Token::Operator(self.skip(|next| matches!(next, '=' | '!' | '~'))))
            }
            '\0' => Err(self.error("a NUL character".into())),
            _ if self.value_next => {
                self.value_next = false;
                Ok(Token::Value(self.skip(|next| next != ',' && !next.is_whitespace() && !next.is_control())))
            }
            _ if is_field(first) => Ok(Token::Field(self.skip(is_field))),
            other => Err(self.error(format!("unexpected {other:?}"))),
        }
    }

    fn bump(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.position += next.len_utf8();
        Some(next)
    }

    /// Takes characters while `wanted`, and gives what was taken.
    fn skip(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.input.get(self.position..).unwrap_or_default();
        let end = rest.find(|next| !wanted(next)).unwrap_or(rest.len());
        self.position += end;
        rest.get(..end).unwrap_or_default()
    }

    fn quoted(&mut self, quote: char) -> Result<Token<'a>, FilterError> {
        self.bump();
        let mut bytes = Vec::new();
        loop {
            match self.bump() {
                None | Some('\n') => return Err(self.error("a quote is not closed".into())),
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(end) if end == quote => break,
                Some(other) => push(&mut bytes, other),
            }
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Token::Quoted { quote, text }),
            Err(_) => Err(self.error("quoted text is not UTF-8".into())),
        }
    }

    fn escape(&mut self, quote: char, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let byte = match self.bump() {
            Some('a') => 0x07,
            Some('b') => 0x08,
            Some('f') => 0x0c,
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('v') => 0x0b,
            Some('\\') => b'\\',
            Some(same) if same == quote => {
                push(bytes, same);
                return Ok(());
            }
            Some('x') => self.byte(0, 16, 2)?,
            Some(octal) if octal.is_digit(8) => self.byte(octal.to_digit(8).unwrap_or_default(), 8, 2)?,
            Some('u') => return self.unicode(4, bytes),
            Some('U') => return self.unicode(8, bytes),
            _ => return Err(self.error("an escape sequence that Go does not know".into())),
        };
        bytes.push(byte);
        Ok(())
    }

    fn byte(&mut self, start: u32, radix: u32, digits: usize) -> Result<u8, FilterError> {
        let value = self.number(start, radix, digits)?;
        u8::try_from(value).map_err(|_| self.error(format!("{value} does not fit into a byte")))
    }

    fn unicode(&mut self, digits: usize, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let value = self.number(0, 16, digits)?;
        // Go writes the replacement character for half a surrogate pair, and refuses what is beyond Unicode.
        let character = match value {
            0xd800..=0xdfff => Some(char::REPLACEMENT_CHARACTER),
            other => char::from_u32(other),
        };
        let character = character.ok_or_else(|| self.error(format!("U+{value:X} does not exist")))?;
        push(bytes, character);
        Ok(())
    }

    fn number(&mut self, start: u32, radix: u32, digits: usize) -> Result<u32, FilterError> {
        let mut value = start;
        for _ in 0..digits {
            let digit = self.bump().and_then(|next| next.to_digit(radix));
            // Eight hexadecimal digits are the most there are: no overflow.
            value = value.wrapping_mul(radix) | digit.ok_or_else(|| self.error("too few digits".into()))?;
        }
        Ok(value)
    }
}

const fn is_field(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '_'
}

fn push(bytes: &mut Vec<u8>, character: char) {
    bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
}
