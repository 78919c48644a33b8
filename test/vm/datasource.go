package vm

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

// Instance is what a cloud provider tells a machine: a key that may log in, and user-data.
type Instance struct{ Key, UserData string }

// Hardware is what a cloud provider adds to a machine: arguments of qemu, and parameters of
// the kernel.
type Hardware struct {
	Devices []string
	Kernel  string
}

// Datasource provides an instance's data on a wire, and returns what makes cloud-init find
// it.
type Datasource func(*Wire, testing.TB, Instance) Hardware

// NoCloud provides an instance's data on a disk.
func (w *Wire) NoCloud(t testing.TB, i Instance) Hardware {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"user-data":      i.UserData,
		"network-config": w.networkConfig(),
		"meta-data":      "instance-id: i-first\nlocal-hostname: guest\npublic-keys:\n- " + i.Key,
	} {
		write(t, dir+"/"+name, text, 0o644)
	}
	return Hardware{Devices: []string{
		"-blockdev", "driver=vvfat,node-name=seed,read-only=on,label=cidata,dir=" + dir,
		"-device", "virtio-blk-pci,drive=seed",
	}}
}

// networkConfig returns cloud-init's network configuration, version 2. It uses the
// machine's interface name, as cloud-init's renderer for ifupdown supports no other.
func (w *Wire) networkConfig() string {
	return fmt.Sprintf(`version: 2
ethernets:
  ens3:
    match: {macaddress: "%s"}
    addresses: [%s/24, "%s/64"]
    gateway4: %s
    gateway6: "%s"
`, w.MAC, w.Machine.V4, w.Machine.V6, w.Router.V4, w.Router.V6)
}

// metadata is where DigitalOcean serves an instance's data. A droplet reaches it from a
// link-local address, before its network is configured.
var metadata = netip.MustParseAddr("169.254.169.254")

// Droplet serves an instance's data as DigitalOcean does: the machine is recognised by its
// SMBIOS data, and its network is part of the metadata.
func (w *Wire) Droplet(t testing.TB, i Instance) Hardware {
	t.Helper()
	const serial = 1234
	type values map[string]any
	data, err := json.Marshal(values{
		"droplet_id":  serial, // cloud-init compares it with the serial number at each boot
		"hostname":    "guest",
		"region":      "nyc3",
		"user_data":   i.UserData,
		"vendor_data": "#cloud-config\n{}\n",
		"public_keys": []string{strings.TrimSpace(i.Key)},
		"dns":         values{"nameservers": []string{w.Router.V4.String()}},
		"interfaces": values{"public": []values{{
			"mac":  w.MAC,
			"type": "public",
			"ipv4": values{"ip_address": w.Machine.V4, "netmask": "255.255.255.0", "gateway": w.Router.V4},
			"ipv6": values{"ip_address": w.Machine.V6, "cidr": 64, "gateway": w.Router.V6},
			// The source of a reserved address's traffic.
			"anchor_ipv4": values{"ip_address": "10.17.0.5", "netmask": "255.255.0.0", "gateway": "10.17.0.1"},
		}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Outsider.MustRun(t, "ip", "addr", "add", metadata.String()+"/16", "dev", w.Device)
	w.serve(t, metadata, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/metadata/v1.json" {
			http.NotFound(rw, r)
			return
		}
		rw.Header().Set("Content-Type", "application/json")
		rw.Write(data)
	})
	return Hardware{
		Devices: []string{"-smbios", fmt.Sprintf("type=1,manufacturer=DigitalOcean,product=Droplet,serial=%d", serial)},
		// The provider's images have it. Without it the interface may be renamed or not:
		// cloud-init uses it at once.
		Kernel: "net.ifnames=0",
	}
}
