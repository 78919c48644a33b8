package lab

import "slices"

// Looks reports whether a step of a system.System changes nothing.
func Looks(op string) bool { return slices.Contains([]string{"read", "stat", "list", "readlink"}, op) }

// Before returns a system.Step that calls a function before each step that
// changes something; an error from it is that step's error.
func Before(call func(op, name string) error) func(op, name string, do func() error) error {
	return func(op, name string, do func() error) error {
		if !Looks(op) {
			if err := call(op, name); err != nil {
				return err
			}
		}
		return do()
	}
}
