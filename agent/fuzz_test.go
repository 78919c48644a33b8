package agent

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/store"
)

// FuzzWatchNote gives the service's note to the other runs any text: what is
// in it only shows.
func FuzzWatchNote(f *testing.F) {
	for _, n := range []watchNote{{}, {Verified: time.Now(), Pauses: []pausedFight{{"rules", time.Now().Add(time.Hour)}}}} {
		data, err := json.Marshal(n)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(data, '\n'))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBench(t)
		b.write(t, watchFile, string(data))
		for _, p := range b.agent.loadNote().Pauses {
			if !p.Until.After(time.Now().Add(-time.Minute)) {
				t.Errorf("a pause that is over: %v", p)
			}
			_ = p.String()
		}
		if _, err := b.agent.Status(context.Background(), Facts{}); err != nil {
			t.Errorf("status: %v", err)
		}
	})
}

// FuzzStateStatus has status and verify look at any text in the state's place.
func FuzzStateStatus(f *testing.F) {
	b := newBench(f)
	if err := b.agent.Store.Save(decided(f, "192.0.2.9/32")); err != nil {
		f.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(b.root, store.StateFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBench(t)
		b.write(t, store.StateFile, string(data))
		s, err := b.agent.Status(context.Background(), Facts{})
		if err == nil {
			_, err = json.Marshal(s)
			s.message()
			s.issue()
		}
		if err != nil {
			t.Errorf("status: %v", err)
		}
		if r, err := b.agent.Verify(context.Background(), noPorts); err == nil {
			b.agent.nextEnd()
			b.agent.Mend(context.Background(), r)
		}
	})
}
