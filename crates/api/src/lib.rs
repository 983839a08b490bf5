//! Versioned request and response types and the typed client.
