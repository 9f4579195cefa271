"""Tables and plots over several run folders."""
