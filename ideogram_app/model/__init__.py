"""Load: files to modules on a device, whole or offloaded, and the cache of what stays loaded."""
