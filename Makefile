# To see the program at work: make demo. To test it: make test. The other targets
# are for its development; "make help" lists them.
VERSION   ?= $(shell git describe --tags --match 'v*' --dirty 2>/dev/null | sed 's/^v//' | grep . || sed -n 's/^## \([0-9][0-9.]*\).*/\1/p' CHANGELOG.md | head -1)
GOFLAGS   := -trimpath
LDFLAGS   := -s -w -buildid= -X main.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: help build demo demo-record test test-all test-vm test-matrix rpm rpm-el6 repo release lint bench fuzz clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1	/p' Makefile | expand -t 12

build: ## build ./basicfw-agent
	CGO_ENABLED=0 go build $(GOFLAGS) -ldflags '$(LDFLAGS)' -o basicfw-agent ./cmd/basicfw-agent

demo: build ## show first boot, status, port scans and a repair, in temporary network namespaces
	test/install iproute2 iptables nmap python3
	test/demo ./basicfw-agent

demo-record: build ## record make demo as docs/demo.svg
	test/install iproute2 iptables nmap python3
	test/demo-record ./basicfw-agent docs/demo.svg

test: ## run the tests that take minutes, with one backend where one is enough
	test/install iproute2 iptables nftables nmap procps cloud-init systemd openssh-server iputils-ping groff-base man-db curl wget openssl ca-certificates
	BASICFW_TESTS=quick go test -count=1 -timeout 20m $$(go list ./... | grep -v /packaging/)

test-all: ## run what make test leaves out: all backends, container engines, the RPM, the fault walk
	test/install iproute2 iptables nftables nmap procps openssh-server docker.io containerd podman netavark rpm rpmlint systemd gpg gpg-agent createrepo-c dnf curl prometheus prometheus-node-exporter ansible-core fail2ban
	BASICFW_TESTS=rest go test -count=1 -timeout 30m -skip '^TestFaults$$' ./test/kernel ./packaging/...
	go test -count=1 -v -timeout 45m -run '^TestFaults$$' ./test/kernel

# Packages for the boot tests. iptables and nftables are for those in containers.
VM_TOOLS := iproute2 iptables nftables systemd-container mmdebstrap qemu-system-x86 qemu-utils e2fsprogs dosfstools openssh-client rpm cloud-init

test-vm: rpm ## run the boot tests: virtual machines with cloud-init and the RPM, rebooted
	test/install $(VM_TOOLS)
	go test -count=1 -timeout 50m -tags vm -v -skip '^Test(SystemV|Audit)$$|^TestBoot$$/^debian-(11|13|sid)$$|^TestBoot$$/^bare$$/^from/^day_two$$' ./test/vm/...

test-matrix: rpm ## run the boot test on Debian 11, 12, 13 and sid, without iptables, and with System V's init; lynis
	test/install $(VM_TOOLS)
	go test -count=1 -timeout 150m -tags vm -v -run '^Test(Boot|SystemV|Audit)$$' ./test/vm

rpm: ## build RPMs for x86_64 and aarch64 in dist/
	packaging/rpm/build $(VERSION)

rpm-el6: ## build the RPM for CentOS 6 in dist/, with Go 1.23
	EL6=yes packaging/rpm/build $(VERSION)

repo: ## build the RPMs, and a dnf repository of them in dist/repo
	test/install createrepo-c gpg gpg-agent rpm
	packaging/repo/build $(VERSION)

release: ## make all files of the release VERSION=x in dist/release: packages, repository, checksums, notes
	test/install createrepo-c gpg gpg-agent rpm
	packaging/release/build $(if $(filter command line,$(origin VERSION)),$(VERSION))

lint: ## run gofmt, go vet, staticcheck and govulncheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	go mod tidy -diff
	go vet ./... && go vet -tags vm ./test/vm/...
	go run $(STATICCHECK) -tags vm ./...
	@if curl -fsS -o /dev/null --max-time 20 https://vuln.go.dev/index/db.json 2>/dev/null; \
	then go run $(GOVULNCHECK) ./...; \
	else echo "govulncheck: its database cannot be reached; NOT checked"; fi

bench: build ## measure times, page faults and sizes against their limits
	test/install iproute2 iptables nftables
	go run ./test/bench ./basicfw-agent

fuzz: ## run every fuzz target for FUZZTIME (30s)
	test/fuzz $(or $(FUZZTIME),30s)

clean: ## remove what was built
	rm -rf basicfw-agent dist .cache
