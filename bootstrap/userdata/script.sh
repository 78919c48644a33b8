message=@MESSAGE@
finish() {
  systemctl --no-block stop basicfw-bootstrap.timer >/dev/null 2>&1
  exit 0
}
exec 9>/run/basicfw-bootstrap.lock
flock -w 600 9 # the timer and runcmd may come at the same time
[ -e "$message" ] || finish
@SOURCE@
# CHANGE: the profile, and the addresses that may log in over SSH.
set -- @FLAGS@
@CA@

tell() {
  [ -z "$1" ] || echo "basicfw: the firewall is not active$1 /var/log/cloud-init-output.log" >"$message"
  { cat "$message" >/dev/console; } 2>/dev/null || :
}
# Also later in this boot, every two minutes. In the background: systemd starts no
# timer before this script has ended.
fail() {
  tell "$1"
  systemd-run --unit=basicfw-bootstrap --on-active=2min --on-unit-inactive=2min \
    sh /run/basicfw-bootstrap >/dev/null 2>&1 </dev/null 9>&- &
  exit 1
}
retry() { # a command for a minute, while it fails at once
  IFS=. read -r start _ </proc/uptime
  until "$@"; do
    IFS=. read -r now _ </proc/uptime
    [ $((now - start)) -lt 60 ] || { echo "basicfw: given up: $*" >&2; return 1; }
    sleep 5
  done
}

# Until bootstrap has succeeded, only SSH is open, if there is nft or iptables.
guard() {
  ports=$({ echo 22; /usr/sbin/sshd -T 2>/dev/null | sed -n 's/^port //p'; } | sort -u | paste -sd, -)
  if nft "add table inet basicfw-guard; delete table inet basicfw-guard; table inet basicfw-guard {
    chain input {
      type filter hook input priority 0; policy drop;
      iif lo accept
      ct state established,related accept
      meta l4proto { icmp, ipv6-icmp } accept
      udp dport { 68, 546 } accept
      tcp dport { $ports } accept
    }
  }" || { lift; chain iptables icmp && { [ ! -e /proc/net/if_inet6 ] || chain ip6tables ipv6-icmp; }; }; then
    open=', and only SSH is open'
  fi
}
chain() {
  add="$1 -t mangle -A basicfw-guard -j"
  $1 -t mangle -N basicfw-guard && : >/run/basicfw-guard &&
    $add ACCEPT -i lo && $add ACCEPT -m conntrack --ctstate ESTABLISHED,RELATED && $add ACCEPT -p "$2" &&
    $add ACCEPT -p udp -m multiport --dports 68,546 && $add ACCEPT -p tcp -m multiport --dports "$ports" &&
    $add DROP && $1 -t mangle -I INPUT -j basicfw-guard
}
lift() {
  [ -e /run/basicfw-guard ] || return 0
  for t in iptables ip6tables; do
    $t -t mangle -D INPUT -j basicfw-guard
    $t -t mangle -F basicfw-guard
    $t -t mangle -X basicfw-guard
  done 2>/dev/null
  rm -f /run/basicfw-guard
}

@GET@

tell ''
if ! rpm -q basicfw-agent >/dev/null 2>&1; then
  guard
  get || fail "$open: its package cannot be installed. See"
fi
# bootstrap itself removes the table of nft once it has closed the server.
lift
if /usr/sbin/basicfw-agent bootstrap --or-failsafe "$@" && [ -e /var/lib/basicfw/state.json ]; then
  rm -f "$message"
  nft delete table inet basicfw-guard 2>/dev/null
  finish
fi
[ -e /var/lib/basicfw/state.json ] || guard
fail ' as configured. See: basicfw-agent status, and'
