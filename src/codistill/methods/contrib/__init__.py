"""Methods beyond the papers that the project began with; CONTRIBUTING.md says when one moves up."""
