"""The LLM that labels: prompt, read-out, calibration, and the stage that runs it over a corpus."""
