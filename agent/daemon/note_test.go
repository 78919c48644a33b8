package daemon

import (
	"context"
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/test/fake"
)

// FuzzNote puts any text into the note for commands, which only show it.
func FuzzNote(f *testing.F) {
	for _, n := range []Note{{}, {Verified: time.Now(), Pauses: []Pause{{"rules", time.Now().Add(time.Hour)}, {"files", time.Now().Add(-time.Hour)}}}} {
		data, err := json.Marshal(n)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(data, '\n'))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		w := watch(t, fake.New(t))
		w.Write(t, noteFile, string(data))
		for _, p := range LoadNote(w.System, w.Now.Time).Pauses {
			if !p.Until.After(w.Now.Time) {
				t.Errorf("the pause is over: %v", p)
			}
			_ = p.String()
		}
		in, err := w.gather(context.Background())
		if err != nil {
			t.Errorf("status: %v", err)
		}
		report.New(in)
	})
}

// FuzzDue checks a machine with any text as its state and computes when it expires.
func FuzzDue(f *testing.F) {
	fake.FuzzState(f, func(t *testing.T, data string) {
		w := watch(t, fake.New(t))
		w.Write(t, store.StateFile, data)
		w.daemon.due()
		w.check(0)
		w.daemon.due()
	})
}

// A note that another user may have written is ignored.
func TestNoteIsTheDaemons(t *testing.T) {
	w, _ := newWatched(t)
	w.daemon.note(w.Now.Time)
	if n := LoadNote(w.System, w.Now.Time); !n.Verified.Equal(w.Now.Time) {
		t.Errorf("the note is %+v", n)
	}
	if err := os.Chmod(w.Path(noteFile), 0o666); err != nil {
		t.Fatal(err)
	}
	if n := LoadNote(w.System, w.Now.Time); !n.Verified.IsZero() {
		t.Errorf("it is used: %+v", n)
	}
}
