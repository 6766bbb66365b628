"""What a person runs and looks at: evaluation with its report, the data doctor, the page that serves a detector."""
