"""Exchange of tasks and answers with other labelling tools: one module for each format."""
