//! Runs instances on one machine: runtimes, cgroups, network namespaces, images, health checks.
