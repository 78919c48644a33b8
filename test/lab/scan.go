package lab

import (
	"encoding/binary"
	"encoding/xml"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Port is nmap's result for a port: "open", "closed", "filtered", "open|filtered" or
// "unfiltered", and the reason ("syn-ack", "reset", "no-response", "admin-prohibited",
// ...).
type Port struct{ State, Reason string }

// Silent reports whether there was no answer at all.
func (p Port) Silent() bool { return p.Reason == "no-response" }

// Nmap scans ports (in nmap's syntax: "-" is all, "22,80") of a host from one of the
// namespace's addresses. The most frequent result, which nmap prints as a group, is under
// port 0.
func (n *Namespace) Nmap(t testing.TB, from, to netip.Addr, ports string, options ...string) map[uint16]Port {
	t.Helper()
	Need(t, "nmap")
	args := []string{"nmap", "-n", "-Pn", "-T5", "--min-rate", "100000", "--max-retries", "2", "-oX", "-",
		"-e", "eth0", "-S", from.String(), "-p" + ports}
	if to.Is6() {
		args = append(args, "-6")
	}
	args = append(append(args, options...), to.String())
	var doc struct {
		Ports []struct {
			ID    uint16 `xml:"portid,attr"`
			State struct {
				State  string `xml:"state,attr"`
				Reason string `xml:"reason,attr"`
			} `xml:"state"`
		} `xml:"host>ports>port"`
		Extra []struct {
			State   string `xml:"state,attr"`
			Reasons []struct {
				Reason string `xml:"reason,attr"`
				Ports  string `xml:"ports,attr"`
			} `xml:"extrareasons"`
		} `xml:"host>ports>extraports"`
	}
	out := n.MustRun(t, args...)
	if err := xml.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatalf("parsing the output of %v: %v\n%s", args, err, out)
	}
	found := map[uint16]Port{}
	for _, p := range doc.Ports {
		found[p.ID] = Port{p.State.State, p.State.Reason}
	}
	for _, e := range doc.Extra {
		for _, r := range e.Reasons {
			// A short list names each port ("21,23,80"); a range is the group.
			if strings.Count(r.Ports, ",") > 100 || strings.Contains(r.Ports, "-") {
				if other, two := found[0]; two {
					t.Fatalf("%v: two groups of ports, %v and %v\n%s", args, other, r, out)
				}
				found[0] = Port{e.State, r.Reason}
				continue
			}
			for _, p := range strings.Split(r.Ports, ",") {
				id, err := strconv.ParseUint(p, 10, 16)
				if err != nil {
					t.Fatalf("%v: %v\n%s", args, err, out)
				}
				found[uint16(id)] = Port{e.State, r.Reason}
			}
		}
	}
	return found
}

// TCP flags.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
)

// firstProbe is the source port of the probe without flags; the flags are added for the
// others.
const firstProbe = 20000

// Flags sends one TCP packet to each port for each of the 256 combinations of flags. It
// returns for each port the flags of the answers, by the flags of the probe.
func (n *Namespace) Flags(t testing.TB, from, to netip.Addr, ports ...uint16) map[uint16]map[uint8]uint8 {
	t.Helper()
	network := "ip4:tcp"
	if to.Is6() {
		network = "ip6:tcp"
	}
	var c net.PacketConn
	err := n.Do(func() (err error) {
		c, err = net.ListenPacket(network, from.String())
		return err
	})
	if err != nil {
		t.Fatalf("opening a raw socket: %v", err)
	}
	defer c.Close()
	answers := map[uint16]map[uint8]uint8{}
	for _, port := range ports {
		answers[port] = map[uint8]uint8{}
		for flags := 0; flags < 256; flags++ {
			seg := segment(from, to, firstProbe+uint16(flags), port, uint8(flags))
			if _, err := c.WriteTo(seg, &net.IPAddr{IP: to.AsSlice()}); err != nil {
				t.Fatalf("sending flags %#02x to port %d: %v", flags, port, err)
			}
		}
		// Stop after this much silence: the answers are already on the wire.
		buf := make([]byte, 1500)
		for {
			c.SetReadDeadline(time.Now().Add(Brief / 2))
			size, _, err := c.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatalf("reading answers of port %d: %v", port, err)
			}
			if size < 20 {
				continue
			}
			probe := binary.BigEndian.Uint16(buf[2:])
			if binary.BigEndian.Uint16(buf) == port && probe >= firstProbe && probe < firstProbe+256 {
				answers[port][uint8(probe-firstProbe)] = buf[13]
			}
		}
	}
	return answers
}

// segment returns a TCP header with its checksum (RFC 9293).
func segment(from, to netip.Addr, srcPort, dstPort uint16, flags uint8) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h[0:], srcPort)
	binary.BigEndian.PutUint16(h[2:], dstPort)
	binary.BigEndian.PutUint32(h[4:], 0x1234567) // sequence
	if flags&ACK != 0 {
		binary.BigEndian.PutUint32(h[8:], 0x7654321)
	}
	h[12] = 5 << 4 // the header's length in words
	h[13] = flags
	binary.BigEndian.PutUint16(h[14:], 1024) // window
	pseudo := append(append(from.AsSlice(), to.AsSlice()...), 0, 6, 0, 20)
	var sum uint32
	for _, b := range [][]byte{pseudo, h} {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(h[16:], ^uint16(sum))
	return h
}

// Ports joins ports for nmap's command line.
func Ports(ports ...uint16) string {
	s := ""
	for i, p := range ports {
		if i > 0 {
			s += ","
		}
		s += strconv.Itoa(int(p))
	}
	return s
}
