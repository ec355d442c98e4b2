"""The endpoints: one HTTP protocol, spoken by the student and by the teacher, on Ray Serve."""
