//! What the tests of the server share: an engine that hashes instead of computing, served.
