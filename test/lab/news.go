package lab

import (
	"testing"
	"time"
)

// News records that something under test has reported an event, not which.
type News chan struct{}

// NewNews returns a News without an event.
func NewNews() News { return make(News, 1) }

// Tell reports an event. It does not block.
func (n News) Tell() {
	select {
	case n <- struct{}{}:
	default:
	}
}

// quietFor is the time without events after which there is none.
const quietFor = 200 * time.Millisecond

// Heard reports whether there was an event within wait. One event may be reported several
// times; Heard waits until it is quiet again.
func (n News) Heard(wait time.Duration) bool {
	select {
	case <-n:
	case <-time.After(wait):
		return false
	}
	for {
		select {
		case <-n:
		case <-time.After(quietFor):
			return true
		}
	}
}

// Want fails if there is no event though one is expected, or an unexpected one.
func (n News) Want(t testing.TB, of string, want bool) {
	t.Helper()
	wait := 10 * time.Second
	if !want {
		wait = quietFor
	}
	if heard := n.Heard(wait); heard != want {
		t.Errorf("%s: reported %v, want %v", of, heard, want)
	}
}
