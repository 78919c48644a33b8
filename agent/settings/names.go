package settings

import (
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// ServicesFile is the file with the names of ports (services(5)).
const ServicesFile = "/etc/services"

// maxServices is the maximum size of ServicesFile, which has about 700 KB in some systems.
const maxServices = 4 << 20

// Port is a port, a range or a protocol without ports.
type Port struct {
	Ports firewall.PortRange
	Proto firewall.Proto
}

// ParsePort parses a port, or a name of ServicesFile: "8080/tcp", "vrrp", "https",
// "domain/udp". A name can have several ports; TCP is first.
func ParsePort(sys *system.System, text string) ([]Port, error) {
	ports, proto, err := firewall.ParsePorts(text)
	if err == nil {
		return []Port{{ports, proto}}, nil
	}
	name, only, limited := strings.Cut(text, "/")
	if !isServiceName(name) || limited && !firewall.Proto(only).HasPorts() {
		return nil, err
	}
	data, unread := sys.ReadLimited(ServicesFile, maxServices)
	if unread != nil {
		return nil, fmt.Errorf("%w; %s cannot be read: %w", err, ServicesFile, unread)
	}
	var list []Port
	for _, line := range strings.Split(string(data), "\n") {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) < 2 || !slices.Contains(append(words[:1:1], words[2:]...), name) {
			continue
		}
		ports, proto, err := firewall.ParsePorts(words[1])
		if p := (Port{ports, proto}); err == nil && (!limited || proto == firewall.Proto(only)) && !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: neither a port such as 8080/tcp, nor a protocol such as vrrp, nor a name in %s", firewall.Quote(text), ServicesFile)
	}
	order := []firewall.Proto{firewall.TCP, firewall.UDP, firewall.SCTP}
	slices.SortStableFunc(list, func(a, b Port) int { return slices.Index(order, a.Proto) - slices.Index(order, b.Proto) })
	return list, nil
}

// isServiceName reports whether text can be a name of ServicesFile.
func isServiceName(text string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	return strings.ContainsAny(text, letters) && strings.Trim(text, letters+"0123456789+._-") == ""
}
