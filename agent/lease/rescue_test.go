package lease

import (
	"testing"
	"time"
)

func TestRescueParameterIsAWholeWord(t *testing.T) {
	for line, want := range map[string]string{
		"":                                       "",
		"root=/dev/vda ro quiet\n":               "",
		"root=/dev/vda basicfw.unlock ro\n":      "basicfw.unlock",
		"basicfw.unlock=1h30m":                   "basicfw.unlock=1h30m",
		"basicfw.unlock= quiet":                  "basicfw.unlock=",
		"xbasicfw.unlock basicfw.unlocked":       "",
		"basicfw.unlocks=1h\tbasicfw.unlock=2h":  "basicfw.unlock=2h",
		"basicfw.unlock=1h basicfw.unlock=2h":    "basicfw.unlock=1h",
		`foo="a basicfw.unlock" basicfw.unlock2`: "",
	} {
		if got := RescueParameter(line); got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

// TestRescueLengthForgivesMistakes checks that a typing mistake is reported, and unlocks for the
// default time.
func TestRescueLengthForgivesMistakes(t *testing.T) {
	for _, tt := range []struct {
		text  string
		want  time.Duration
		wrong bool
	}{
		{"", 15 * time.Minute, false},
		{" \n", 15 * time.Minute, false},
		{"basicfw.unlock", 15 * time.Minute, false},
		{"basicfw.unlock=", 15 * time.Minute, false},
		{"basicfw.unlock=2h", 2 * time.Hour, false},
		{"90m\n", 90 * time.Minute, false},
		{"7d", 7 * 24 * time.Hour, false},
		{"basicfw.unlock=tomorrow", 15 * time.Minute, true},
		{"30", 15 * time.Minute, true},
		{"31d", 15 * time.Minute, true},
		{"0s", 15 * time.Minute, true},
		{"-1h", 15 * time.Minute, true},
	} {
		got, err := RescueLength(tt.text)
		if got != tt.want || (err != nil) != tt.wrong {
			t.Errorf("%q: %v, %v; want %v", tt.text, got, err, tt.want)
		}
	}
}
