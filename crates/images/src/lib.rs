//! OCI images: packing, pushing, pulling and unpacking.
