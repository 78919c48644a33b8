package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hostnet"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/managers"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/service"
	"github.com/basicfw/basicfw-agent/agent/session"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/profiles"
)

// wiring is the agent with all that it stands on.
type wiring struct {
	agent   *agent.Agent
	manager *service.Manager
	kernel  *iptables.Backend
	sys     *system.System
	host    hostnet.Host // after facts
	found   agent.Facts  // after facts
	looked  bool         // facts has looked
}

func (a *app) wire() (*wiring, error) {
	families := []firewall.Family{firewall.IPv4}
	if hostnet.HasIPv6() {
		families = append(families, firewall.IPv6)
	}
	manager, err := service.New(a.sys, "")
	if err != nil {
		return nil, err
	}
	kernel := iptables.New(a.sys, families)
	kernels := agent.Kernels{Iptables: kernel, Beside: iptables.Beside{Backend: kernel}, Nftables: nftables.New(a.sys, families),
		Has: kernel.There, InUse: func() bool { return kernel.LegacyInUse() || nftables.Xtables() }}
	w := &wiring{sys: a.sys, manager: manager, kernel: kernel}
	w.agent = &agent.Agent{
		System: a.sys, Kernel: kernels.For, Rules: iptables.Files{}, Table: nftables.Files{}, Store: store.New(a.sys),
		Service: serviceManager{manager}, Conntrack: conntrack{a.sys},
		Managers: managers.New(a.sys, nftables.HasTable), Guard: nftables.Guard{},
		Log: a.log, Version: version, Families: families, Now: time.Now, Boot: system.Boot, Rehearse: a.rehearse,
	}
	return w, nil
}

func (w *wiring) profiles() (*profiles.Set, error) { return profiles.Load(w.sys) }

// state is what was decided, or an error for people.
func (w *wiring) state() (store.State, error) {
	st, err := w.agent.Store.Load()
	return st, explainState(err)
}

// facts looks at the machine. What listens has its processes' names only where they
// are asked for: they take the longest to find.
//
// A command looks once.
func (w *wiring) facts(s settings.Settings, names bool) (agent.Facts, error) {
	if w.looked {
		return w.found, nil
	}
	f, err := w.lookAt(s, names)
	w.found, w.looked = f, err == nil
	return f, err
}

func (w *wiring) lookAt(s settings.Settings, names bool) (agent.Facts, error) {
	var f agent.Facts
	var err error
	// At the same time as the sockets: it takes long, and asks no network namespace,
	// which would have to be this thread's.
	var processes *session.Processes
	var connections []string
	listed := make(chan error, 1)
	go func() {
		var err error
		if processes, err = session.ReadProcesses(); err == nil {
			connections = processes.Connections(os.Getpid())
		}
		listed <- err
	}()
	if w.host, err = hostnet.Detect(s.Public, s.Private); err != nil {
		return f, err
	}
	f.Interfaces = trusting(w.host.Interfaces, s.Trusted)
	f.TakeOver = s.OnConflict != settings.Refuse
	listening, established, err := hostnet.Sockets()
	if err != nil {
		return f, fmt.Errorf("listing sockets: %w", err)
	}
	if err := <-listed; err != nil {
		return f, err
	}
	if f.SSHPorts, f.SSHWhy, f.SSHLive, err = processes.SSHDPorts(w.sys, listening); err != nil {
		w.agent.Log.WithError(err).Warn("not all of sshd's configuration can be read")
		// What cannot be read may name the port that the owner comes in by.
		if st, err := w.agent.Store.Load(); err == nil {
			f.SSHPorts, f.SSHWhy = agent.KeepPorts(f.SSHPorts, f.SSHWhy, st)
		}
	}
	if c, ok := processes.Invoker(connections, established); ok {
		f.Session = &agent.Session{Client: c.Prefix, From: c.Addr, Reason: c.Reason, Began: c.Began}
	}
	for _, c := range processes.Logins(w.sys, established) {
		f.Seen = append(f.Seen, c.Prefix)
	}
	var name map[uint64]string
	if names {
		name = processes.Names(listening)
	}
	f.Listeners = listeners(listening, name)
	if names {
		if set, err := w.profiles(); err == nil {
			f.Profiles = set.All()
		}
	}
	if f.Forwarded, err = nftables.Forwarded(); err != nil {
		w.agent.Log.WithError(err).Warn("not all ports are known that are forwarded past INPUT")
	}
	if f.Closing, err = nftables.Closing(w.kernel.There()); err != nil {
		w.agent.Log.WithError(err).Warn("not all is known that closes ports beside us")
	}
	f.Instance = w.instance()
	f.Surprises = session.Surprises(w.sys)
	if c, err := hostnet.ReadConntrack(); err == nil {
		f.Conntrack = agent.ConntrackUse{Count: c.Count, Max: c.Max}
	}
	return f, nil
}

// listeners gives each port once that something listens on for more than
// loopback, in order.
func listeners(sockets []system.Socket, name map[uint64]string) []agent.Listener {
	var out []agent.Listener
	for _, s := range sockets {
		l := agent.Listener{Proto: firewall.Proto(s.Proto), Port: s.Local.Port(), Process: name[s.Inode]}
		if !s.Local.Addr().IsLoopback() && !slices.Contains(out, l) {
			out = append(out, l)
		}
	}
	slices.SortFunc(out, func(a, b agent.Listener) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Process, b.Process))
	})
	return out
}

// ports tells where sshd is.
func (w *wiring) ports() (ports []uint16, why []string, live bool, err error) {
	listening, _, err := hostnet.Sockets()
	if err != nil {
		return nil, nil, false, err
	}
	processes, err := session.ReadProcesses()
	if err != nil {
		return nil, nil, false, err
	}
	return processes.SSHDPorts(w.sys, listening)
}

// shells are the SSH sessions of people at terminals.
func (w *wiring) shells() ([]agent.Session, error) {
	_, established, err := hostnet.Sockets()
	if err != nil {
		return nil, err
	}
	processes, err := session.ReadProcesses()
	if err != nil {
		return nil, err
	}
	var list []agent.Session
	for _, c := range processes.Shells(w.sys, established) {
		list = append(list, agent.Session{Client: c.Prefix, From: c.Addr, Reason: c.Reason, Began: c.Began})
	}
	return list, nil
}

// look gives the interfaces alone.
func (w *wiring) look(s settings.Settings) ([]firewall.Interface, error) {
	host, err := hostnet.Detect(s.Public, s.Private)
	return trusting(host.Interfaces, s.Trusted), err
}

// trusting gives the interfaces that the owner trusts their zone.
func trusting(interfaces []firewall.Interface, trusted []string) []firewall.Interface {
	for i := range interfaces {
		for _, pattern := range trusted {
			if firewall.MatchInterface(pattern, interfaces[i].Name) {
				interfaces[i].Zone, interfaces[i].Reason = firewall.TrustedZone, "the settings say trusted = "+pattern
			}
		}
	}
	return interfaces
}

// instance is cloud-init's instance-id as far as it is known in this boot.
func (w *wiring) instance() string {
	const max = 4 << 20
	if data, err := w.sys.ReadLimited("/run/cloud-init/instance-data.json", max); err == nil {
		var d struct {
			V1 struct {
				InstanceID string `json:"instance_id"`
			} `json:"v1"`
		}
		if json.Unmarshal(data, &d) == nil && d.V1.InstanceID != "" {
			return d.V1.InstanceID
		}
	}
	// Between its local and its network stage cloud-init has only this.
	data, err := w.sys.ReadLimited("/run/cloud-init/.instance-id", 4096)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(data))
}

// serviceManager is the machine's, as the agent wants it.
type serviceManager struct{ *service.Manager }

func (m serviceManager) Status() (agent.ServiceStatus, error) {
	st, err := m.Manager.Status()
	return agent.ServiceStatus{Registered: st.Registered, Enabled: st.Enabled, Active: st.Active}, err
}

// conntrack is the kernel's table of connections, as the agent wants it.
type conntrack struct{ sys *system.System }

func (c conntrack) Grow(ctx context.Context) (store.Conntrack, error) {
	before, err := hostnet.GrowConntrack(ctx, c.sys)
	return store.Conntrack{Max: before.Max, Buckets: before.Buckets}, err
}

func (c conntrack) Set(size store.Conntrack) error {
	return hostnet.SetConntrack(c.sys, hostnet.Conntrack{Max: size.Max, Buckets: size.Buckets})
}

func (c conntrack) Adopt() (int, error) { return hostnet.Adopt() }

// notify tells the service manager; where there is none it is no error.
func notify(log logrus.FieldLogger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.WithError(err).Warn("the service manager could not be told")
	}
}
