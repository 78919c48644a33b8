package report

import (
	"cmp"
	"fmt"
	"slices"
)

// Severities of warnings.
const (
	Info     = "info"     // worth knowing
	Warn     = "warning"  // should be fixed
	Critical = "critical" // the machine is exposed, locked or about to fail
)

// Warning is a finding for the administrator.
type Warning struct {
	Code     string `json:"code"`     // from the table below; codes never change
	Severity string `json:"severity"` // Info, Warn or Critical
	Text     string `json:"text"`     // a sentence
	Fix      string `json:"fix"`      // a command or an instruction; "" if there is none
}

// row is a kind of warning.
type row struct {
	code, severity string
	text           string // a format; "" if the row only adds a command to Status.Next
	fix            string // the default; addFix replaces it
	action         bool   // fix is an instruction, not a command
	login          bool   // also shown in the login message
	// public is set if the arguments of text, and the fix that replaces the default, are
	// numbers, times, and names and words that this program or the administrator chose: all
	// users may read them. Otherwise they read brief and the default fix, because text from elsewhere
	// may contain a client's address.
	public bool
	brief  string
}

const (
	allowCommand     = "basicfw-agent ssh allow YOUR-ADDRESS"
	confirmCommand   = "basicfw-agent confirm"
	bootstrapCommand = "basicfw-agent bootstrap"
	// RestoreCommand restores a lost desired state from its copy.
	RestoreCommand = "basicfw-agent verify --repair"
)

// rows is the table of all warnings. Its order is that of Status.Warnings and, for their
// fixes, of Status.Next. First comes what would undo the other fixes, then what closes or
// opens the whole machine, then who may log in.
var rows = []row{
	{code: Pending, fix: confirmCommand},
	{code: "conflict-active", severity: Critical, text: "%s is also active: its rules apply too, and it may flush ours", public: true},
	{code: "conflict-at-boot", severity: Warn, text: "%s is not active, but starts at the next boot", public: true},
	{code: Drifted, fix: "basicfw-agent verify --repair"},
	{code: Unprotected},
	{code: "input-closed", severity: Critical, text: "%s: %s"},
	{code: Exposed, severity: Critical, text: "%s", fix: "remove this rule, or open the port in the settings", action: true},
	{code: Blocked, severity: Critical, text: "%s", fix: "remove this rule, or close the port in the settings", action: true},
	{code: NotBootstrapped, fix: bootstrapCommand, public: true},
	{code: Failsafe, fix: bootstrapCommand},
	{code: "repair-paused", severity: Critical, text: "%s", fix: "see journalctl -u basicfw-agent", action: true, login: true, brief: "repairs of the rules fail or do not last"},
	{code: "ssh-closed", severity: Critical, text: "SSH is blocked for every address: only console login is possible", login: true, public: true},
	{code: "ssh-open", severity: Warn, text: "SSH is open to any address: %s", fix: allowCommand, login: true, brief: "SSH is open to any address"},
	{code: "ssh-probation", severity: Warn, text: "SSH opens to any address at %s unless the detected client logs in with a new session", fix: confirmCommand, login: true, public: true},
	{code: "ssh-caller-not-allowed", severity: Warn, text: "your address %s is not allowed to log in again"},
	{code: "ssh-family-closed", severity: Info, text: "SSH over %[1]s is blocked: no %[1]s address is allowed", action: true, public: true},
	{code: "rolled-back", severity: Warn, text: "%s", fix: "basicfw-agent plan", login: true, public: true},
	{code: Unlocked, fix: "basicfw-agent lock"},
	{code: "state-missing", severity: Critical, text: "rules of basicfw-agent are loaded, but %s does not exist", public: true},
	{code: "state-lost", fix: RestoreCommand},
	{code: "inspection-failed", severity: Critical, text: "the rules cannot be read: %v"},
	{code: "conflicts-unknown", severity: Warn, text: "other firewall programs may be active: %v"},
	{code: "verify", severity: Warn, text: "%s"},
	{code: "backend", severity: Warn, text: "%s"},
	{code: "open-sometimes", severity: Warn, text: "%s, within a limit of rate or time"},
	{code: "exposure-unknown", severity: Critical, text: "it is not known who reaches which ports: %v"},
	{code: "ports-forwarded", severity: Warn, text: "%s, bypassing this firewall", action: true, login: true, public: true},
	{code: "ports-left", severity: Info, text: "ports that containers publish are not held to the profile, as in earlier versions", action: true, public: true,
		fix: "to close them, set \"published = profile\" in [containers], then run: basicfw-agent apply"},
	{code: "cluster-api", severity: Warn, text: "pods on %[1]s do not reach the API server (6443/tcp): open it there, or set \"trusted = %[1]s\" in [interfaces]", public: true},
	{code: "ipvs-untracked", severity: Warn, text: "IPVS hides connections from conntrack: only their first packet passes", fix: "sysctl -w net.ipv4.vs.conntrack=1", public: true},
	{code: "reply-route", severity: Warn, text: "the kernel drops packets from outside on %s: replies would leave by %s, and rp_filter is strict", public: true},
	{code: "redirect-unanswered", severity: Warn, text: "%s is redirected to %s, where nothing listens", fix: "start the server, or remove the rule", action: true, public: true},
	{code: "conntrack-helper", severity: Warn, text: "connections that a conntrack helper expects are dropped: %s", fix: "open their ports, such as: basicfw-agent open 50000-50100/tcp", action: true, brief: "connections that a conntrack helper expects are dropped"},
	{code: "port-untracked", severity: Info, text: "%s is exempt from conntrack, so its open connections end when it is closed: %s", fix: "remove this rule unless the server is busy", action: true, brief: "ports are exempt from conntrack"},
	{code: "transparent-proxy", severity: Info, text: "packets for a proxy pass INPUT with the port that the client dials: %s", fix: "open that port, such as: basicfw-agent open 80/tcp", action: true, brief: "packets are handed to a proxy"},
	{code: "sshd-port", severity: Warn, text: "%s", action: true},
	{code: "list-kept", severity: Warn, text: "%s", fix: "repair the file", action: true, brief: "a file of addresses cannot be used; the list that was read last stays in effect"},
	{code: "no-interface", severity: Warn, text: "no %[2]s interface exists; %[1]s will open when one appears", public: true},
	{code: "interface-absent", severity: Warn, text: "%s in [interfaces]: no such interface exists", public: true},
	{code: "interface-member", severity: Warn, text: "no packet arrives on %s, which the settings name: it belongs to %s", fix: "name that one instead", action: true, public: true},
	{code: "conntrack-nearly-full", severity: Critical, text: "the conntrack table is nearly full: %d of %d entries", public: true},
	{code: "other-version", severity: Info, text: "the rules are those of version %s; \"basicfw-agent plan\" shows what this version would change", public: true},
	{code: "host", severity: Warn, text: "%s"},
	{code: "backup-lost", severity: Warn, text: "the backup from before bootstrap is lost: uninstall can remove basicfw-agent's rules, but not restore what bootstrap removed", public: true},
	{code: "settings-invalid", severity: Warn, text: "the settings are invalid, and apply would refuse them: %s"},
}

// Codes returns the codes of all warnings that have a text.
func Codes() (codes []string) {
	for _, r := range rows {
		if r.text != "" {
			codes = append(codes, r.code)
		}
	}
	return codes
}

// rowOf returns the index of a code in rows.
func rowOf(code string) int {
	return slices.IndexFunc(rows, func(r row) bool { return r.code == code })
}

// warnings collects the rows that apply, including those of conditions.
type warnings []Warning

func (w *warnings) add(code string, args ...any) { w.addFix(code, "", args...) }

// addFix adds a row whose fix replaces that of the table.
func (w *warnings) addFix(code, fix string, args ...any) {
	r := rows[rowOf(code)]
	one := Warning{Code: code, Severity: r.severity, Fix: cmp.Or(fix, r.fix)}
	if r.text != "" {
		one.Text = fmt.Sprintf(r.text, args...)
	}
	*w = append(*w, one)
}

// sorted returns the warnings to show, and the commands to run next without duplicates:
// all of them, and as all users may read them.
func (w warnings) sorted() (shown []Warning, next, public []string) {
	slices.SortStableFunc(w, func(a, b Warning) int { return rowOf(a.Code) - rowOf(b.Code) })
	add := func(list *[]string, command string) {
		if command != "" && !slices.Contains(*list, command) {
			*list = append(*list, command)
		}
	}
	for _, one := range w {
		r := rows[rowOf(one.Code)]
		if r.text != "" {
			shown = append(shown, one)
		}
		if !r.action {
			add(&next, one.Fix)
			add(&public, one.public().Fix)
		}
	}
	return shown, next, public
}

// public returns a warning as all users may read it.
func (w Warning) public() Warning {
	if r := rows[rowOf(w.Code)]; !r.public {
		w.Text, w.Fix = r.brief, r.fix
	}
	return w
}

// message returns a warning's line of the login message, "" if it has none.
func (w Warning) message() string {
	r := rows[rowOf(w.Code)]
	if !r.login {
		return ""
	}
	w = w.public()
	run := w.Fix
	switch {
	case r.action:
		run = "basicfw-agent status"
	case run == allowCommand: // most readers are logged in over SSH
		run = "basicfw-agent ssh allow me"
	}
	return w.Text + ". Run: " + run
}
