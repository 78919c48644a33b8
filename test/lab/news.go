package lab

import (
	"testing"
	"time"
)

// News is what something under test tells of: that there is some, not what.
type News chan struct{}

// NewNews is none yet.
func NewNews() News { return make(News, 1) }

// Tell is given to what is to tell. It does not wait.
func (n News) Tell() {
	select {
	case n <- struct{}{}:
	default:
	}
}

// quietFor is how long nothing has to come for there to be none.
const quietFor = 200 * time.Millisecond

// Heard tells whether there is news: some is waited for, and none takes a while
// to be sure of. The same news may come in several parts.
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

// Want fails where there is no news though there should be some, or the other
// way round.
func (n News) Want(t testing.TB, of string, want bool) {
	t.Helper()
	wait := 10 * time.Second
	if !want {
		wait = quietFor
	}
	if heard := n.Heard(wait); heard != want {
		t.Errorf("%s: told %v, want %v", of, heard, want)
	}
}
