package vm

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// Wire is a network that a machine shares with an outsider, who is several
// people: the client who may log in, on the machine's own network, a
// stranger behind its default route, and the router to there. All addresses are
// from the ranges for documentation (RFC 5737, RFC 3849).
type Wire struct {
	Outsider                  *lab.Namespace
	Machine, Client, Stranger lab.Addrs
	Router                    lab.Addrs
	Device, MAC               string
}

// NewWire makes a network that lasts as long as the test.
func NewWire(t testing.TB) *Wire {
	t.Helper()
	w := &Wire{
		Outsider: lab.NewNamespace(t),
		Machine:  lab.Addrs{V4: netip.MustParseAddr("192.0.2.1"), V6: netip.MustParseAddr("2001:db8:0:1::1")},
		Client:   lab.Addrs{V4: netip.MustParseAddr("192.0.2.10"), V6: netip.MustParseAddr("2001:db8:0:1::10")},
		Stranger: lab.Addrs{V4: netip.MustParseAddr("198.51.100.20"), V6: netip.MustParseAddr("2001:db8:0:2::20")},
		Router:   lab.Addrs{V4: netip.MustParseAddr("192.0.2.254"), V6: netip.MustParseAddr("2001:db8:0:1::fe")},
		Device:   "tap0",
		MAC:      "02:00:00:00:02:01",
	}
	lines := []string{
		"tuntap add dev " + w.Device + " mode tap",
		fmt.Sprintf("addr add %s/24 dev %s", w.Router.V4, w.Device),
		fmt.Sprintf("addr add %s/64 dev %s nodad", w.Router.V6, w.Device),
		fmt.Sprintf("addr add %s/24 dev %s", w.Client.V4, w.Device),
		fmt.Sprintf("addr add %s/64 dev %s nodad", w.Client.V6, w.Device),
		fmt.Sprintf("addr add %s/32 dev %s", w.Stranger.V4, w.Device),
		fmt.Sprintf("addr add %s/128 dev %s nodad", w.Stranger.V6, w.Device),
		"link set " + w.Device + " up",
	}
	// Who has to ask for the machine's hardware address first does so once a
	// second, and would miss what happens in between while it boots.
	for _, a := range w.Machine.Both() {
		lines = append(lines, fmt.Sprintf("neigh replace %s lladdr %s nud permanent dev %s", a, w.MAC, w.Device))
	}
	r := w.Outsider.Run(t, lab.Command{Args: []string{"ip", "-batch", "-"}, Stdin: strings.Join(lines, "\n") + "\n"})
	if r.Code != 0 {
		t.Fatalf("laying the wire: %s", r.Stderr)
	}
	return w
}

// NetworkConfig is cloud-init's, version 2.
func (w *Wire) NetworkConfig() string {
	return fmt.Sprintf(`version: 2
ethernets:
  public:
    match: {macaddress: "%s"}
    addresses: [%s/24, "%s/64"]
    gateway4: %s
    gateway6: "%s"
    accept-ra: false
`, w.MAC, w.Machine.V4, w.Machine.V6, w.Router.V4, w.Router.V6)
}

// Serve offers a file for download, and gives its URL.
func (w *Wire) Serve(t testing.TB, file string) string {
	t.Helper()
	var l net.Listener
	addr := netip.AddrPortFrom(w.Router.V4, 80).String()
	err := w.Outsider.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatalf("serving downloads: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	go http.Serve(l, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		http.ServeFile(rw, r, file)
	}))
	return "http://" + addr + "/basicfw-agent.rpm"
}
