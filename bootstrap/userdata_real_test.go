package bootstrap

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// outside adds a client in a network namespace, and ports that answer. reach logs which of
// them the client reaches.
const outside = `
ip link set lo up
ip netns add out
ip link add v0 type veth peer name v1 netns out
ip addr add 192.0.2.1/24 dev v0
ip addr add 2001:db8::1/64 dev v0 nodad
ip link set v0 up
ip -n out addr add 192.0.2.2/24 dev v1
ip -n out addr add 2001:db8::2/64 dev v1 nodad
ip -n out link set v1 up
cat >/run/fake/listen <<'EOF'
import selectors, socket
wait = selectors.DefaultSelector()
for port in 22, 2222, 80, 8080:
    wait.register(socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True), selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in wait.select():
        key.fileobj.accept()[0].close()
EOF
cat >/run/fake/reach <<'EOF'
import socket
for to in "192.0.2.1", "2001:db8::1":
    for port in 22, 2222, 80, 8080:
        try:
            socket.create_connection((to, port), 1).close()
            print(port, end=" ")
        except OSError:
            pass
EOF
python3 /run/fake/listen >/run/fake/listening & listener=$!
until grep -q ready /run/fake/listening; do :; done
reach() { echo "$1: $(ip netns exec out python3 /run/fake/reach)" >>/run/fake/log; }
`

// TestGuardCloses checks with packets what is open while the package cannot be installed,
// and after bootstrap by the real program.
func TestGuardCloses(t *testing.T) {
	lab.NeedTools(t, "nft", "iptables", "ip", "/usr/bin/python3")
	agent := filepath.Join(t.TempDir(), "agent")
	build := exec.Command("go", "build", "-o", agent, "../cmd/basicfw-agent")
	if build.Env = append(os.Environ(), "CGO_ENABLED=0"); build.Run() != nil {
		t.Fatal("the program cannot be built")
	}
	for name, without := range map[string]string{
		"nft":      "rm /usr/local/bin/nft /usr/local/bin/iptables /usr/local/bin/ip6tables",
		"iptables": "rm /usr/local/bin/iptables /usr/local/bin/ip6tables; touch /run/fake/nonft",
	} {
		t.Run(name, func(t *testing.T) {
			got := onStage(t, UserDataOptions{RPMURL: testRPM, ClientIP: "192.0.2.2", Profile: "web-only"}, outside+without+`
fake /usr/sbin/basicfw-agent 'exec `+agent+` "$@" --no-service >/dev/null'
mkdir -p /etc/sysconfig
reach before
touch /run/fake/offline
say bootcmd
reach offline
rm /run/fake/offline
say runcmd
reach after
for t in iptables-save ip6tables-save "/usr/sbin/nft list ruleset"; do
	$t | grep guard >>/run/fake/log || :
done
kill $listener
`)
			var shown []string
			for _, line := range strings.Split(got, "\n") {
				if !strings.HasPrefix(line, "curl") && !strings.HasPrefix(line, "basicfw: ") && !strings.HasPrefix(line, "nft ") && line != "guard" {
					shown = append(shown, line)
				}
			}
			want := []string{"before: 22 2222 80 8080 22 2222 80 8080 ",
				"bootcmd: 1 basicfw: the firewall is not active, and only SSH is open: its package",
				"offline: 22 2222 22 2222 ", "rpm -U package", "runcmd: 0 ", "after: 22 80 80 ", ""}
			if strings.Join(shown, "\n") != strings.Join(want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(shown, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

// redirecting starts a server for https and one for http. The system trusts its certificate.
const redirecting = `
ip link set lo up
openssl req -x509 -newkey rsa:2048 -nodes -keyout /run/fake/key -out /run/fake/cert -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost 2>/dev/null
cat /run/fake/cert >>/etc/ssl/certs/ca-certificates.crt
cat >/run/fake/serve <<'EOF'
import http.server, ssl, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with open("/run/fake/log", "a") as log:
            print("served", self.server.server_port, self.path, file=log)
        if self.path == "/down":
            self.send_response(302)
            self.send_header("Location", "http://localhost:8080/agent.rpm")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"package")
    def log_message(self, *args): pass
plain, secure = (http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) for port in (8080, 8443))
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/run/fake/cert", "/run/fake/key")
secure.socket = context.wrap_socket(secure.socket, server_side=True)
threading.Thread(target=plain.serve_forever).start()
print("ready", flush=True)
secure.serve_forever()
EOF
python3 /run/fake/serve >/run/fake/serving & server=$!
until grep -q ready /run/fake/serving; do :; done
rm /usr/local/bin/curl
`

// TestRedirectToHTTP checks that neither program follows a redirect from https to http.
func TestRedirectToHTTP(t *testing.T) {
	lab.NeedTools(t, "curl", "wget", "openssl", "/usr/bin/python3", "/etc/ssl/certs/ca-certificates.crt")
	for name, remove := range map[string]string{"curl": "", "wget": "rm /usr/bin/curl\n"} {
		t.Run(name, func(t *testing.T) {
			for path, want := range map[string]string{
				"/agent.rpm": "guard\nserved 8443 /agent.rpm\nrpm -U package\nbasicfw-agent bootstrap --or-failsafe\n",
				"/down":      "guard\n" + strings.Repeat("served 8443 /down\n", 13) + "bootcmd: 1 ",
			} {
				got := onStage(t, UserDataOptions{RPMURL: "https://localhost:8443" + path}, redirecting+remove+"say bootcmd\nkill -9 $server\n")
				if !strings.HasPrefix(got, want) {
					t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
				}
			}
		})
	}
}

// TestPrivateCA checks that curl and wget trust the given CA, and no other.
func TestPrivateCA(t *testing.T) {
	lab.NeedTools(t, "curl", "wget", "openssl", "/usr/bin/python3", "/etc/ssl/certs/ca-certificates.crt")
	dir := t.TempDir()
	for _, name := range []string{"ours", "other"} {
		if out, err := exec.Command("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", filepath.Join(dir, name+".key"), "-out", filepath.Join(dir, name+".pem"),
			"-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ours.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for name, remove := range map[string]string{"curl": "", "wget": "rm /usr/bin/curl\n"} {
		for server, want := range map[string]string{
			"ours":  "guard\nserved 8443 /agent.rpm\nrpm -U package\n",
			"other": "guard\nbootcmd: 1 ",
		} {
			t.Run(name+" "+server, func(t *testing.T) {
				got := onStage(t, UserDataOptions{RPMURL: "https://localhost:8443/agent.rpm", CA: ca}, strings.Replace(redirecting, "python3 /run/fake/serve",
					"cp "+filepath.Join(dir, server+".pem")+" /run/fake/cert; cp "+filepath.Join(dir, server+".key")+" /run/fake/key\npython3 /run/fake/serve", 1)+
					remove+"say bootcmd\nkill -9 $server\n")
				if !strings.HasPrefix(got, want) {
					t.Errorf("got\n%s\nwant\n%s", got, want)
				}
			})
		}
	}
}
