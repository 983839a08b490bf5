//! Config loading, tracing, authentication, HTTP serving, shutdown and retry, shared by every daemon.
