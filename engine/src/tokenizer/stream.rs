//! Token ids to text while they are generated: whole characters only, and stop strings.

use std::sync::Arc;

use super::Tokenizer;
use crate::error::Error;

/// Ids that may wait for the rest of a character. A model can emit bytes that never become one.
const PENDING_MAX: usize = 8;

/// A character has at most four bytes: its beginning lies in the last three ids.
const CHARACTER_IDS_MAX: usize = 3;

/// Turns one sequence's ids into text piece by piece.
///
/// ```text
/// window:  | ids whose text was given out | ids that wait for more bytes |
/// text:    | ........................... given_len | U+FFFD ........... |
/// ```
/// The window keeps a few ids that are done with, because some decoders treat the first token of a
/// text in another way than the following ones.
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    /// Special tokens that are text here, by id.
    shown: Vec<(u32, String)>,
    window: Vec<u32>,
    /// Ids of the window whose text was all given out.
    num_done: usize,
    /// Text of the window that was given out.
    given: String,
}

impl TextStream {
    pub fn new(tokenizer: Arc<Tokenizer>) -> TextStream {
        TextStream {
            tokenizer,
            shown: Vec::new(),
            window: Vec::new(),
            num_done: 0,
            given: String::new(),
        }
    }

    /// As [`TextStream::new`], but with those of `markers` that are special tokens as text. Others
    /// are text anyway.
    pub fn showing(tokenizer: Arc<Tokenizer>, markers: &[&str]) -> TextStream {
        let find = |marker: &&str| Some((tokenizer.token_id(marker)?, (*marker).to_owned()));
        let shown = markers.iter().filter_map(find).collect();
        TextStream { shown, ..TextStream::new(tokenizer) }
    }

    /// The text that `id` completes; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        if let Some((_, marker)) = self.shown.iter().find(|(shown, _)| *shown == id) {
            let marker = marker.clone();
            return Ok(self.flush()? + &marker);
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window)?;
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let mut piece = self.give(whole);
        if whole.len() == text.len() {
            self.shift(self.window.len())?;
        } else if self.window.len() - self.num_done > PENDING_MAX {
            let num_lost = self.window.len() - CHARACTER_IDS_MAX;
            let text = self.tokenizer.decode(&self.window[..num_lost])?;
            piece.push_str(&self.give(&text));
            self.shift(num_lost)?;
        }
        Ok(piece)
    }

    /// What is left at the end of the sequence; incomplete characters become U+FFFD.
    pub fn flush(&mut self) -> Result<String, Error> {
        let text = self.tokenizer.decode(&self.window)?;
        let piece = self.give(&text);
        self.window.clear();
        self.given.clear();
        self.num_done = 0;
        Ok(piece)
    }

    /// The part of `text`, the window's text, that was not given out yet.
    fn give(&mut self, text: &str) -> String {
        match text.strip_prefix(self.given.as_str()) {
            Some(piece) => {
                let piece = piece.to_owned();
                self.given.push_str(&piece);
                piece
            }
            // More bytes are wanted before the text grows beyond what is out.
            None if text.len() <= self.given.len() => String::new(),
            // The decoder changed its mind about text that is out; go on behind it.
            None => {
                let mut start = self.given.len();
                while !text.is_char_boundary(start) {
                    start += 1;
                }
                let piece = text[start..].to_owned();
                self.given = text.to_owned();
                piece
            }
        }
    }

    /// Notes that all text of the first `num_done` ids is out, and drops the ids done before them.
    fn shift(&mut self, num_done: usize) -> Result<(), Error> {
        let num_dropped = self.num_done;
        self.window.drain(..num_dropped);
        self.num_done = num_done - num_dropped;
        self.given = self.tokenizer.decode(&self.window[..self.num_done])?;
        Ok(())
    }
}

/// Cuts a stream of text before the first stop string in it, also where the string arrives in
/// parts.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    is_stopped: bool,
}

impl StopStrings {
    pub fn new(stops: Vec<String>) -> Result<StopStrings, Error> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::Request("a stop string is empty; give at least a character".into()));
        }
        Ok(StopStrings { stops, held: String::new(), is_stopped: false })
    }

    /// Whether a stop string was found; text after it is dropped.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// The text that is certainly before any stop string, once `piece` is there.
    pub fn push(&mut self, piece: &str) -> String {
        if self.is_stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min()
        {
            self.is_stopped = true;
            self.held.truncate(end);
            return std::mem::take(&mut self.held);
        }
        let kept = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, at the end of the sequence.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let len_max = text.len().min(stop.len() - 1);
    let is_overlap = |&len: &usize| stop.is_char_boundary(len) && text.ends_with(&stop[..len]);
    (1..=len_max).rev().find(is_overlap).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_stops(stops: &[&str], pieces: &[&str], expect: &[&str], is_stopped: bool) {
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut stops = StopStrings::new(stops).unwrap();
        let mut got: Vec<String> = pieces.iter().map(|piece| stops.push(piece)).collect();
        got.push(stops.flush());
        assert_eq!(got, expect);
        assert_eq!(stops.is_stopped(), is_stopped);
    }

    #[test]
    fn finds_stop_strings_across_pieces() {
        check_stops(&[], &["a", "b"], &["a", "b", ""], false);
        check_stops(&["END"], &["one E", "N", "D two", "x"], &["one ", "", "", "", ""], true);
        check_stops(&["END"], &["one E", "N", "d"], &["one ", "", "ENd", ""], false);
        check_stops(&["END"], &["EEN", "DD"], &["E", "", ""], true);
        check_stops(&["END"], &["the EN"], &["the ", "EN"], false);
        check_stops(&["b", "abc"], &["xa", "bc"], &["x", "", ""], true);
        check_stops(&["日本"], &["a日", "本b"], &["a", "", ""], true);
        check_stops(&["日本"], &["a日", "の"], &["a", "日の", ""], false);
        assert!(StopStrings::new(vec![String::new()]).is_err());
    }
}
