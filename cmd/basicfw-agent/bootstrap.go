package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

type bootstrapFlags struct {
	profile, clientIP, backend    string
	noService, dryRun, orFailsafe bool
	noRehearsal, noSelftest       bool
	force                         bool
	// forgetClient drops the client that a flag named for another instance.
	forgetClient bool
}

func (a *app) bootstrapCmd() *cobra.Command {
	var f bootstrapFlags
	cmd := &cobra.Command{
		Use:   "bootstrap",
		Short: "Close this machine: detect, decide, load, persist, register the service",
		Long: `Close this machine. Bootstrap detects the network interfaces, sshd's ports and
who provisions the machine, chooses the profile, loads the rules for IPv4 and
IPv6, reads them back, keeps them for the next boot, registers the service, and
tries the rules with real packets in a copy of this machine's network, as
"basicfw-agent selftest" does. Where anything fails, all is as it was before.

Run again, it changes nothing, unless flags or settings changed. Flags are kept
in /etc/basicfw/local.ini, which wins over agent.ini.`,
		Example: `  basicfw-agent bootstrap
  basicfw-agent bootstrap --profile web+mail --client-ip 203.0.113.9,2001:db8::/64
  basicfw-agent bootstrap --dry-run`,
		Args: noArgs,
		RunE: a.alone(func(ctx context.Context, w *wiring) error { return a.bootstrap(ctx, w, f) }),
	}
	cmd.Flags().StringVar(&f.profile, "profile", "", "profile: auto, web-only, web+mail, or one of your own")
	cmd.Flags().StringVar(&f.clientIP, "client-ip", "", "who may log in over SSH: addresses and CIDRs, separated by commas")
	cmd.Flags().StringVar(&f.backend, "backend", "", "what loads the rules: auto, iptables or nftables")
	cmd.Flags().BoolVar(&f.noService, "no-service", false, "do not register the service")
	cmd.Flags().BoolVar(&f.noRehearsal, "no-rehearsal", false, "load the rules without trying out first whether the kernel takes them")
	cmd.Flags().BoolVar(&f.noSelftest, "no-selftest", false, "do not try the rules with packets")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "show what would change, and change nothing")
	cmd.Flags().BoolVar(&f.force, "force", false, "even if the address that you come from is shut out")
	cmd.Flags().BoolVar(&f.orFailsafe, "or-failsafe", false, "if it fails, close the machine all the same, with SSH limited from anywhere")
	a.completeFlags(cmd, map[string]completer{"profile": a.profileNames, "backend": func() []string { return []string{"auto", "iptables", "nftables"} }})
	return cmd
}

func (a *app) bootstrap(ctx context.Context, w *wiring, f bootstrapFlags) error {
	err := a.tryBootstrap(ctx, w, f)
	if err == nil || !f.orFailsafe || f.dryRun {
		return err
	}
	// The error stays the command's: whoever reads the log must see it first.
	if e := a.failsafe(ctx, w, f, err); e != nil {
		return fmt.Errorf("%w\nand the machine could not be closed all the same: %w", err, e)
	}
	return err
}

func (a *app) tryBootstrap(ctx context.Context, w *wiring, f bootstrapFlags) error {
	if st, err := w.agent.Store.Load(); err == nil && isClone(st.InstanceID, w.instance()) {
		// Who made the first machine may have nothing to do with its clone.
		f.forgetClient = f.clientIP == ""
	}
	s, local, err := a.loadSettings(f)
	if err != nil {
		return err
	}
	if err := a.converge(ctx, w, s, convergeRequest{local: local, clear: true, takeOver: true, service: !f.noService, dryRun: f.dryRun, force: f.force, selftest: !f.noSelftest, noRehearsal: f.noRehearsal}); err != nil || f.dryRun {
		return err
	}
	// While it is there, user-data tries again at each boot, with its own flags.
	return a.sys.Remove(bootstrap.MessageFile)
}

// loadSettings reads the settings with the flags over them, and says how
// local.ini has to become to keep the flags; nil is as it is.
func (a *app) loadSettings(f bootstrapFlags) (settings.Settings, *agent.Change, error) {
	s, err := settings.Load(a.sys, a.config)
	var changes []settings.Change
	var problems settings.Errors
	if err != nil && !errors.As(err, &problems) {
		return s, nil, err
	}
	for _, flag := range []struct{ name, section, key, value string }{
		{"--profile", "agent", "profile", f.profile},
		{"--backend", "agent", "backend", f.backend},
		{"--client-ip", "ssh", "client_ip", f.clientIP},
	} {
		if flag.value == "" {
			continue
		}
		if err := s.Set(flag.section, flag.key, flag.value, flag.name); err != nil {
			var more settings.Errors
			if !errors.As(err, &more) {
				return s, nil, err
			}
			problems = append(problems, more...)
		}
		changes = append(changes, settings.Change{Section: flag.section, Key: flag.key, Value: flag.value})
	}
	// A client that is named now lets its owner in, also where commands have
	// listed who may log in without one.
	if m := s.Allow.Mode; f.clientIP != "" && (m == settings.AllowList || m == settings.AllowNone) && strings.HasPrefix(s.Sources["ssh.allow"], a.localPath()+":") {
		s.Allow.Mode = settings.AllowClient
		changes = append(changes, settings.Change{Section: "ssh", Key: "allow", Value: s.Allow.String()})
	}
	if at := s.Sources["ssh.client_ip"]; f.forgetClient && strings.HasPrefix(at, a.localPath()+":") {
		s.ClientIP = nil
		changes = append(changes, settings.Change{Section: "ssh", Key: "client_ip"})
	}
	if len(problems) > 0 {
		return s, nil, problems
	}
	local, err := a.localChange(changes)
	return s, local, err
}

// localChange is local.ini as it becomes by changes of settings; nil is as it is.
func (a *app) localChange(changes []settings.Change) (*agent.Change, error) {
	if len(changes) == 0 {
		return nil, nil
	}
	path := a.localPath()
	data, err := a.sys.ReadLimited(path, settings.MaxSize)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if data, err = settings.SetLocal(path, data, changes); err != nil {
		return nil, err
	}
	return &agent.Change{Path: path, Data: data, Mode: 0o600}, nil
}

// localPath is where commands keep settings.
func (a *app) localPath() string { return settings.LocalFile(a.config) }

// convergeRequest is what the commands that change something ask for, and plan.
type convergeRequest struct {
	local                          *agent.Change
	previous                       *store.State // as it is, where that was read
	clear, service, dryRun         bool
	selftest                       bool // at the end
	noRehearsal                    bool
	takeOver                       bool // other firewalls, if the settings say so
	redetect, force, exitCodeDrift bool
	confirm                        time.Duration // for how long, unless confirmed; zero is for good
	// show says what was done, if not showOutcome.
	show func(store.State)
}

// converge decides and makes it so; plan and --dry-run only show it.
func (a *app) converge(ctx context.Context, w *wiring, s settings.Settings, r convergeRequest) error {
	st, previous, warnings, err := a.decide(w, s, r)
	for _, warning := range warnings {
		a.log.Warn(warning)
	}
	if err != nil {
		return err
	}
	if r.noRehearsal {
		w.agent.Rehearse = nil
	}
	o := agent.Options{Previous: previous, Clear: r.clear, Service: r.service, Record: []string{a.localPath()}}
	o.Refuse = s.OnConflict == settings.Refuse
	o.TakeOver = r.takeOver && !o.Refuse
	// Decided on now, and not kept from before.
	o.Choose = previous == nil || previous.Backend.Source != "detected" || r.redetect || isClone(previous.InstanceID, st.InstanceID)
	if r.local != nil {
		o.Files = append(o.Files, *r.local)
	}
	if r.clear && previous != nil {
		// Once: what stands in INPUT later was put there by somebody who knew
		// of us, and is reported rather than removed.
		o.Clear = isClone(previous.InstanceID, st.InstanceID)
	}
	if st.Service = r.service || previous != nil && previous.Service; previous == nil {
		st.Service = r.service
	}
	if r.dryRun {
		out, err := w.agent.Assess(ctx, st, o)
		if err != nil {
			return err
		}
		if o.Refuse && len(out.Others) > 0 {
			fmt.Fprintf(a.stdout, "would be refused: %v\n", &agent.ConflictError{Names: agent.Names(out.Others)})
			out.Others = nil
		}
		st = out.State
		err = a.showPlan(st, previous, out, r)
		a.warnLockout(w, st)
		return err
	}
	o.Check = func(firewall.Inspection) error {
		if previous != nil && !r.force && r.confirm == 0 {
			return refuseLockout(w, st)
		}
		return nil
	}
	if r.selftest {
		o.Prove = func(ctx context.Context, st store.State) error { return a.prove(ctx, w, st) }
	}
	if r.confirm > 0 {
		return a.tryFor(ctx, w, st, r.confirm, o)
	}
	if err := refusePending(w); err != nil {
		return err
	}
	out, err := w.agent.Converge(ctx, st, o)
	var load *agent.LoadError
	if errors.As(err, &load) && agent.WithoutRule(&st) {
		// It may be that this kernel, or these iptables, know no times.
		if out, e := w.agent.Converge(ctx, st, o); e == nil {
			a.log.WithError(err).Warn("the time when SSH opens, unless confirmed, is left to the service")
			return a.converged(w, out.State, out, r)
		}
	}
	if err != nil {
		return err
	}
	return a.converged(w, out.State, out, r)
}

// converged shows what was done.
func (a *app) converged(w *wiring, st store.State, out agent.Outcome, r convergeRequest) error {
	if r.clear && out.Changed {
		// While there is another way in to set it right.
		out.Inspection.Warnings = append(out.Inspection.Warnings, w.found.Surprises...)
	}
	if r.show != nil {
		r.show(st)
	} else {
		a.showOutcome(st, out)
	}
	a.warnLockout(w, st)
	if out.Changed {
		a.announce(w, st, out.Inspection)
	}
	return nil
}

// announce writes the login message. That it cannot is no failure of what was
// done.
func (a *app) announce(w *wiring, st store.State, in firewall.Inspection) {
	if err := w.agent.Announce(st, w.found, in); err != nil {
		a.log.WithError(err).Warn("the login message could not be brought up to date")
	}
}

// decide collects what is known and decides. The warnings are for the user.
func (a *app) decide(w *wiring, s settings.Settings, r convergeRequest) (st store.State, previous *store.State, warnings []string, err error) {
	set, err := w.profiles()
	if err != nil {
		return st, nil, nil, err
	}
	if previous = r.previous; previous == nil {
		if previous, err = a.previous(w); err != nil {
			return st, nil, nil, err
		}
	}
	// The name of what listens for mail is a part of the reason.
	facts, err := w.facts(s, s.Profile == settings.Auto && (previous == nil || r.redetect))
	if err != nil {
		return st, nil, nil, err
	}
	in := bootstrap.Input{Settings: s, Local: a.localPath(), Profiles: set, Facts: facts, CheckClient: w.host.CheckNamed,
		Redetect: r.redetect, Now: w.agent.Moment()}
	in.Previous = previous
	if previous != nil && isClone(previous.InstanceID, facts.Instance) {
		in.Previous = nil // a clone: another machine, and maybe another owner
		warnings = append(warnings, fmt.Sprintf("this is another instance (%q, was %q): deciding anew", facts.Instance, previous.InstanceID))
	}
	if in.Previous != nil {
		in.Unlock = previous.Desired.Unlock
	}
	if previous != nil && previous.Failsafe != "" {
		in.Previous = nil // nothing was decided
	}
	st, more, err := bootstrap.Decide(in)
	return st, previous, append(warnings, more...), err
}

// isClone tells whether an instance is another one than before. One that was
// not known, or is not, says nothing.
func isClone(before, now string) bool { return before != "" && now != "" && before != now }

// previous is the state as it is; nil where there is none that can be used.
func (a *app) previous(w *wiring) (*store.State, error) {
	st, err := w.agent.Store.Load()
	switch {
	case errors.Is(err, store.ErrNone):
		return nil, nil
	case err != nil:
		a.log.WithError(err).Warn("deciding anew")
		return nil, nil
	}
	return &st, nil
}

// failsafe closes a machine whose bootstrap failed with cause: by its profile
// where only the client was refused, else by the failsafe rules.
func (a *app) failsafe(ctx context.Context, w *wiring, f bootstrapFlags, cause error) error {
	var conflict *agent.ConflictError
	if errors.As(cause, &conflict) {
		return nil // closed by the other firewall
	}
	var takeOver *agent.TakeOverError
	if errors.As(cause, &takeOver) && w.agent.Closed(ctx, takeOver.Names) {
		return nil // it stands again
	}
	if st, err := w.agent.Store.Load(); err == nil && st.Failsafe == "" {
		return nil // closed by what was decided before
	}
	var problems settings.Errors
	var invalid *bootstrap.InvalidError
	onlyClient := errors.As(cause, &problems) && problems.OnlyClient() || errors.As(cause, &invalid) && invalid.OnlyClient
	o := agent.Options{Clear: true, Service: !f.noService, Choose: true, Record: []string{a.localPath()}}
	f.clientIP = ""
	s, local, _ := a.loadSettings(f) // what is wrong in it may be the client alone
	o.Refuse = s.OnConflict == settings.Refuse
	o.TakeOver = !o.Refuse
	if onlyClient {
		if local != nil {
			o.Files = append(o.Files, *local)
		}
		s.ClientIP = nil
		s.Allow = settings.Allow{Mode: settings.AllowAny}
		st, _, _, err := a.decide(w, s, convergeRequest{})
		if err == nil {
			st.Failsafe = cause.Error()
			st.Client = store.Client{Source: "none", Reason: "the client that was named is refused: " + cause.Error()}
			st.Service = o.Service
			var out agent.Outcome
			out, err = w.agent.Converge(ctx, st, o)
			a.announce(w, out.State, out.Inspection)
		}
		if err == nil {
			fmt.Fprintf(a.stdout, "closed by profile %s all the same, with SSH open to any address, limited\n", st.Profile.Name)
			return nil
		}
		a.log.WithError(err).Warn("the profile cannot be used either")
	}
	st, err := w.agent.FailsafeState(w.ports, cause)
	if err != nil {
		return err
	}
	st.Service = o.Service
	out, err := w.agent.Converge(ctx, st, o)
	if err != nil {
		return err
	}
	a.announce(w, st, out.Inspection)
	fmt.Fprintln(a.stdout, "closed by the failsafe rules: SSH open to any address, limited, and no other port")
	return nil
}

// showOutcome says what was done, and who may come in from now on.
func (a *app) showOutcome(st store.State, out agent.Outcome) {
	if !out.Changed {
		fmt.Fprintf(a.stdout, "nothing changed: profile %s is in effect already\n", st.Profile.Name)
		return
	}
	fmt.Fprintf(a.stdout, "protected by profile %s (%s)\n", st.Profile.Name, st.Profile.Reason)
	fmt.Fprintf(a.stdout, "  ssh       %s\n", sshSentence(st))
	fmt.Fprintf(a.stdout, "  open      %s\n", openSentence(st.Desired))
	fmt.Fprintf(a.stdout, "  backend   %s; %s\n", out.Inspection.Backend, st.Backend.Reason)
	if out.Registered {
		fmt.Fprintf(a.stdout, "  service   registered: it verifies and repairs all this at every boot\n")
	}
	for i, f := range out.Files {
		label := ""
		if i == 0 {
			label = "written"
		}
		fmt.Fprintf(a.stdout, "  %-9s %s\n", label, f)
	}
	for i, f := range out.Gone {
		label := ""
		if i == 0 {
			label = "removed"
		}
		fmt.Fprintf(a.stdout, "  %-9s %s\n", label, f)
	}
	if out.Adopted > 0 {
		fmt.Fprintf(a.stdout, "  sessions  kept %s\n", count(out.Adopted, "open connection"))
	}
	for i, f := range out.Removed {
		if i == 0 {
			fmt.Fprintf(a.stdout, "  replaced  rules that were in INPUT before, kept for uninstall:\n")
		}
		fmt.Fprintf(a.stdout, "            %s %s\n", f.Family, f.Rule)
	}
	if len(out.Others) > 0 {
		fmt.Fprintf(a.stdout, "  stopped   and disabled: %s; back at uninstall\n", strings.Join(agent.Names(out.Others), ", "))
	}
	for _, warning := range out.Inspection.Warnings {
		fmt.Fprintf(a.stdout, "  warning   %s\n", warning)
	}
	if st.Desired.SSH.Probation != nil {
		fmt.Fprintln(a.stdout, "next: log in anew from there and stay for some seconds, or run there: basicfw-agent confirm")
	}
	if st.Desired.SSH.Mode == firewall.SSHLimited && st.Client.Source != "any" {
		fmt.Fprintln(a.stdout, "next: basicfw-agent ssh allow YOUR-ADDRESS")
	}
}
