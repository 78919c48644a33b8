// Package hint adds to an error what its reader can do about it. The text of the
// error is the cause alone; the command prints the hint on a line of its own.
package hint

import (
	"errors"
	"fmt"
)

type hinted struct {
	error
	hint string
}

func (e *hinted) Unwrap() error { return e.error }

// Wrap returns err with a hint: a phrase, without a full stop.
func Wrap(err error, format string, args ...any) error {
	return &hinted{err, fmt.Sprintf(format, args...)}
}

// Of returns the outermost hint of an error, or "" if it has none.
func Of(err error) string {
	var h *hinted
	if errors.As(err, &h) {
		return h.hint
	}
	return ""
}
