// Package survey collects the facts about this machine that the desired state and the
// status depend on.
package survey

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/sshd"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/profiles"
	"github.com/sirupsen/logrus"
)

// Surveyor collects the facts about one machine.
type Surveyor struct {
	System *system.System
	Store  *store.Store
	Log    logrus.FieldLogger
	Lists  func() []string // the files that the settings name
}

// Naming returns the interfaces that the settings name.
func Naming(s settings.Settings) host.Naming {
	return host.Naming{Public: s.Public, Private: s.Private, Trusted: s.Trusted}
}

// Look returns all facts, and the host in its networks. The host's interfaces have
// the zones as detected, those of the facts the zones in effect. Listeners have the
// names of their processes only if names is set: these take the longest to find.
func (v Surveyor) Look(s settings.Settings, names bool) (h host.Host, f host.Facts, err error) {
	// Processes are read in parallel with the sockets: this takes long, and does not
	// depend on the network namespace, which belongs to this thread.
	var processes *sshd.Processes
	var caller sshd.Caller
	listed := make(chan error, 1)
	go func() {
		var err error
		if processes, err = sshd.ReadProcesses(); err == nil {
			caller = processes.Caller(os.Getpid())
		}
		listed <- err
	}()
	if h, err = host.Detect(); err != nil {
		return h, f, err
	}
	f.Interfaces = v.zoned(h.Interfaces, s)
	f.TakeOver = s.OnConflict != settings.Refuse
	listening, established, err := host.Sockets()
	if err != nil {
		return h, f, fmt.Errorf("listing sockets: %w", err)
	}
	if err := <-listed; err != nil {
		return h, f, err
	}
	if c, ok := processes.Invoker(caller, listening, established); ok && !h.Has(c.Addr) {
		c.Tunnel = processes.Tunnel(c, listening)
		f.Session = &c
	}
	if f.SSHPorts, f.SSHWhy, f.SSHLive, err = processes.SSHDPorts(v.System, listening, f.Session); err != nil {
		v.Log.WithError(err).Warn("cannot read the whole sshd configuration")
		// The unreadable part may set the port that the administrator connects to.
		if st, err := v.Store.Load(); err == nil {
			f.SSHPorts, f.SSHWhy = st.KeepPorts(f.SSHPorts, f.SSHWhy, true)
		}
	}
	for _, c := range processes.Logins(v.System, established) {
		if !h.Has(c.Addr) {
			f.Seen = append(f.Seen, c.Prefix)
		}
	}
	var name map[uint64]string
	if names {
		name = processes.Names(listening)
	}
	if names && len(listening) > 0 { // a profile may open their ports
		if set, err := profiles.Load(v.System); err == nil {
			f.Profiles = set.All()
		}
	}
	f.Listeners = host.Listeners(listening, name)
	if names {
		f.Containers = host.Containers(v.System)
	}
	f.Instance = v.Instance()
	f.LoginWarnings = append(sshd.LoginWarnings(v.System), processes.Multiplexed(caller, listening, established)...)
	f.KeptLists = v.keptLists()
	if c, err := host.ReadConntrack(); err == nil {
		f.Conntrack = c
	}
	f.Hazards = host.ReadHazards(f.Interfaces)
	return h, f, nil
}

// Ports returns sshd's ports, and the source of each.
func (v Surveyor) Ports() (ports []uint16, why []string, live bool, err error) {
	listening, established, err := host.Sockets()
	if err != nil {
		return nil, nil, false, err
	}
	processes, err := sshd.ReadProcesses()
	if err != nil {
		return nil, nil, false, err
	}
	var session *host.Session
	if c, ok := processes.Invoker(processes.Caller(os.Getpid()), listening, established); ok {
		session = &c
	}
	return processes.SSHDPorts(v.System, listening, session)
}

// Shells returns the interactive SSH sessions.
func (v Surveyor) Shells() ([]host.Session, error) {
	_, established, err := host.Sockets()
	if err != nil {
		return nil, err
	}
	processes, err := sshd.ReadProcesses()
	if err != nil {
		return nil, err
	}
	return processes.Shells(v.System, established), nil
}

// Interfaces returns the interfaces alone, as detected.
func (Surveyor) Interfaces() ([]firewall.Interface, error) {
	h, err := host.Detect()
	return h.Interfaces, err
}

// zoned returns the interfaces with the zones in effect: those of the pending change or
// the desired state or, before bootstrap, of the settings.
func (v Surveyor) zoned(detected []firewall.Interface, s settings.Settings) []firewall.Interface {
	st, err := v.Store.Load()
	if p, e := v.Store.LoadPending(); e == nil {
		st, err = p.State, nil
	}
	if err != nil {
		st = store.State{}
	}
	return st.Zoned(detected, Naming(s)).Desired.Interfaces
}

// Instance returns cloud-init's instance-id, or "" if it is not known in this boot. The one
// that cloud-init invents without metadata (DataSourceNone) does not identify the machine.
func (v Surveyor) Instance() string {
	var d struct {
		V1 struct {
			InstanceID string `json:"instance_id"`
		} `json:"v1"`
	}
	data, err := v.System.ReadLimited("/run/cloud-init/instance-data.json", 4<<20)
	if err != nil || json.Unmarshal(data, &d) != nil || d.V1.InstanceID == "" {
		// Between its local and network stages, cloud-init has only this file.
		data, _ = v.System.ReadLimited("/run/cloud-init/.instance-id", 4096)
		d.V1.InstanceID = string(bytes.TrimSpace(data))
	}
	if d.V1.InstanceID == "iid-datasource-none" {
		return ""
	}
	return d.V1.InstanceID
}

// Watch starts calling notify at each event that may concern the rules. Changes in
// what cannot be watched are found by the next periodic check.
func (v Surveyor) Watch(ctx context.Context, notify func()) {
	for _, start := range []func(context.Context, func()) error{
		nftables.Watch,
		host.Watch,
		func(ctx context.Context, notify func()) error {
			return v.System.WatchPaths(ctx, notify, func() []string {
				paths := append(sshd.ConfigPaths(v.System), watchedDirs...)
				if v.Lists != nil { // new settings may name new files
					paths = append(append(paths, "/etc/basicfw"), v.Lists()...)
				}
				for _, f := range v.listFiles() {
					paths = append(paths, f.Path)
				}
				return paths
			})
		},
		v.watchSSHD,
	} {
		if err := start(ctx, notify); err != nil {
			v.Log.WithError(err).Warn("cannot watch for changes: checking once a minute")
		}
	}
}

// watchedDirs hold the persisted rules, the copy of the state, which names the lists to
// follow, and our own unit. sshd's configuration is elsewhere,
// too: see [sshd.ConfigPaths].
var watchedDirs = []string{"/etc/sysconfig", "/etc/iptables", "/etc/nftables", "/etc/basicfw", "/etc/systemd/system", "/etc/systemd/system/sysinit.target.wants"}

// watchSSHD calls notify when sshd has begun to listen, since it then writes its process ID.
func (v Surveyor) watchSSHD(ctx context.Context, notify func()) error {
	started, err := v.System.Watch(ctx, "/run/sshd.pid")
	if err != nil {
		return err
	}
	go func() {
		for {
			select {
			case <-started:
				notify()
			case <-ctx.Done():
				return
			}
		}
	}()
	return nil
}

// Now returns the current time and uptime.
func Now() firewall.Moment {
	m := firewall.Moment{Time: time.Now()}
	if boot, uptime, err := system.Boot(); err == nil {
		m.Boot, m.Uptime = boot, uptime
	}
	return m
}
