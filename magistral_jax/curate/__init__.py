"""From raw problems to training problems: format, difficulty, wrong references, tests of programs (report §4)."""
