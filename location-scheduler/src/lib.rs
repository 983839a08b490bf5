//! Machines, reservations, assignments and routes of one location.
