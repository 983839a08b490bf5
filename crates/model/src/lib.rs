//! Identifiers, quantities, specs, desired and observed types, validation.
