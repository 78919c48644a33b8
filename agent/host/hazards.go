package host

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Hazards are kernel settings that make the kernel drop packets that the rules
// accept, or fail to recognise the connection of packets.
type Hazards struct {
	IPVS       bool         // IPVS hides the connections of its services from conntrack
	Helpers    []string     // conntrack helpers that the kernel assigns by itself
	Asymmetric []Asymmetric // interfaces with a strict reverse path filter
}

// Asymmetric is a public interface that drops packets from outside, because replies would
// leave by another one.
type Asymmetric struct{ Name, Via string }

// ReadHazards returns the hazards of this network namespace.
func ReadHazards(interfaces []firewall.Interface) Hazards {
	return kernelFiles{"/proc", "/sys"}.hazards(interfaces, outgoing)
}

// kernelFiles are the paths where the kernel's file systems are mounted.
type kernelFiles struct{ proc, sys string }

func (k kernelFiles) hazards(interfaces []firewall.Interface, outgoing func(from netip.Addr) string) (h Hazards) {
	const header = 3 // lines
	if services, err := os.ReadFile(filepath.Join(k.proc, "net/ip_vs")); err == nil && bytes.Count(services, []byte("\n")) > header {
		h.IPVS = k.setting("net/ipv4/vs/conntrack") == "0"
	}
	// By default since Linux 4.7, and always since 6.0, only rules assign them.
	if k.setting("net/netfilter/nf_conntrack_helper") == "1" {
		for _, name := range []string{"amanda", "ftp", "h323", "irc", "netbios_ns", "pptp", "sane", "sip", "snmp", "tftp"} {
			if _, err := os.Stat(filepath.Join(k.sys, "module/nf_conntrack_"+name)); err == nil {
				h.Helpers = append(h.Helpers, name)
			}
		}
	}
	// The higher of two settings counts (linux/inetdevice.h, IN_DEV_RPFILTER). 1 is strict.
	// A VRF has a routing table of its own.
	all := k.setting("net/ipv4/conf/all/rp_filter")
	for _, i := range interfaces {
		if i.Zone != firewall.PublicZone || i.Master != "" || i.Kind == "vrf" || max(all, k.setting("net/ipv4/conf/"+i.Name+"/rp_filter")) != "1" {
			continue
		}
		for _, a := range i.Addresses {
			if !a.Addr().Is4() {
				continue
			}
			if via := outgoing(a.Addr()); via != "" && via != i.Name {
				h.Asymmetric = append(h.Asymmetric, Asymmetric{i.Name, via})
				break
			}
		}
	}
	return h
}

// setting returns a kernel parameter, or "" if it does not exist.
func (k kernelFiles) setting(name string) string {
	data, err := os.ReadFile(filepath.Join(k.proc, "sys", name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// outside is an internet address without a route of its own (198.41.0.4 is a root
// name server, whose address has been the same for decades).
var outside = netip.AddrFrom4([4]byte{198, 41, 0, 4})

// outgoing returns the interface by which packets from an address leave for the internet, or "".
func outgoing(from netip.Addr) string {
	routes, err := netlink.RouteGetWithOptions(net.IP(outside.AsSlice()), &netlink.RouteGetOptions{SrcAddr: net.IP(from.AsSlice())})
	if err != nil || len(routes) == 0 {
		return ""
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}
