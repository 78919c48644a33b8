package settings

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func TestParsePort(t *testing.T) {
	sys := &system.System{Root: t.TempDir()}
	if _, err := ParsePort(sys, "https"); err == nil || !strings.Contains(err.Error(), "/etc/services cannot be read") {
		t.Errorf("without the file: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(sys.Root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	const text = "# comment https 1/tcp\nhttp\t\t80/tcp\t\twww # web\nhttps 443/tcp\nhttps 443/udp\nhttps 443/sctp\n" +
		"domain 53/udp\ndomain 53/tcp\nodd 7/dccp\nbroken 99999/tcp\nx\n"
	if err := os.WriteFile(filepath.Join(sys.Root, "etc/services"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"8080/tcp": "8080/tcp", "vrrp": "vrrp", "http": "80/tcp", "www": "80/tcp", "https": "443/tcp 443/udp 443/sctp", "https/udp": "443/udp",
		"domain": "53/tcp 53/udp",
		"odd":    "error neither a port", "broken": "error neither a port", "x": "error neither a port", "comment": "error neither a port",
		"8080": "error write 8080/tcp", "https/esp": "error want a port", "ht*": "error want a port",
	} {
		list, err := ParsePort(sys, in)
		var got []string
		for _, p := range list {
			got = append(got, firewall.FormatPorts(p.Ports, p.Proto))
		}
		if err != nil {
			got = []string{"error", err.Error()}
		}
		wrong, isError := strings.CutPrefix(want, "error ")
		if text := fmt.Sprint(strings.Join(got, " ")); isError != (err != nil) || isError && !strings.Contains(text, wrong) || !isError && text != want {
			t.Errorf("%q: %s, want %s", in, text, want)
		}
	}
}
