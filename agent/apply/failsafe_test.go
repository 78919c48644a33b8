package apply_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/test/fake"
)

// The failsafe rules open SSH, with a rate limit, on sshd's ports and nothing else.
func TestFailsafeLeavesSSHOpen(t *testing.T) {
	m := fake.New(t)
	for _, tt := range []struct {
		ports []uint16
		err   error
		want  []uint16
	}{{[]uint16{2222}, nil, []uint16{2222}}, {nil, nil, []uint16{22}}, {nil, errors.New("no sshd"), []uint16{22}}} {
		m.Ports = func() ([]uint16, []string, bool, error) { return tt.ports, nil, true, tt.err }
		st, err := m.Failsafe(errors.New("the cause"))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, st.Desired.SSH.Ports); diff != "" || st.Desired.SSH.Mode != firewall.SSHLimited || len(st.Desired.Services()) > 0 || st.Failsafe != "the cause" {
			t.Errorf("%+v, %q: %s", st.Desired, st.Failsafe, diff)
		}
	}
}
