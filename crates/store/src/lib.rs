//! Keys, revisions, transactions, watches and leases over an embedded engine.
