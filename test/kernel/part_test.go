package kernel_test

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// part selects tests: "quick" are those of make test, "rest" those that make test-all adds.
// Without BASICFW_TESTS, all run.
var part = os.Getenv("BASICFW_TESTS")

// byBackend lists the tests of what each backend does in its own way: loading, reading back,
// comparing, repairing and removing rules. In the quick part these run with all their
// variants, and the others with the first only.
var byBackend = []string{
	"TestBesideOverridden", "TestBesideReject", "TestBesideStock", "TestBlock", "TestBlockSets", "TestBootPrograms", "TestBootstrapAgain", "TestBrokenIptablesAtBoot",
	"TestConfirm", "TestErased", "TestFiles", "TestFlags", "TestInputOfAllKinds", "TestManyNetworks", "TestMetrics", "TestOpen", "TestOthersRules",
	"TestPersistedFiles", "TestProtocols", "TestPublished", "TestSelftest", "TestServiceLimit", "TestServices", "TestStatus", "TestStatusReachable", "TestStockRules", "TestToLoopback", "TestUninstall", "TestUntracked", "TestVarWiped",
	"TestWideOpen",
}

// slow lists the tests that only the rest has: container engines, the fault walk, files
// damaged in every way, and waits of half a minute and more.
var slow = []string{
	"TestDocker", "TestPodman", "TestFaults", "TestFail2ban", "TestBlockFor", "TestBlockMany",
	"TestBesidePolicy", "TestAnsible", "TestAnsibleFleet", "TestMetricsCollected", "TestPendingSpoiled", "TestRecordSpoiled", "TestRulesSpoiled",
	"TestLinux2632", "TestSequences", "TestIptablesHangs", "TestLockOfHungProcess", "TestProbationProved", "TestWatchEachMinute",
}

// single lists the tests that choose their variant themselves. The rest leaves them out.
var single = []string{
	"TestAutoProfile", "TestBadFlags", "TestBadInputCorners", "TestBare", "TestDirectoryOfAnother", "TestFileOfAnother",
	"TestFollowMessage", "TestForgedEnviron", "TestForgedSSHD", "TestForgedUtmp", "TestHandWritten", "TestIptablesBackWhileRunning",
	"TestLockHeld", "TestNoIptables", "TestNotRoot", "TestOpenRefused", "TestOtherManagers", "TestPublishedLater", "TestRulesDirectory", "TestSelftestRefuses",
	"TestSSHDetected", "TestSSHForced", "TestSSHRefused", "TestTextOfOthers", "TestWatchChurn",
}

// skipped returns a pattern of the tests that are not in the part.
func skipped() string {
	switch part {
	case "quick":
		return "^(" + strings.Join(slow, "|") + ")$"
	case "rest":
		return "^(" + strings.Join(single, "|") + ")$"
	}
	return ""
}

// ofPart returns the variants of a test that are in the part.
func ofPart(t *testing.T, variants []string) []string {
	name, _, _ := strings.Cut(t.Name(), "/")
	first := 1
	switch {
	case part == "" || slices.Contains(slow, name):
		return variants
	case slices.Contains(byBackend, name):
		first = len(variants)
	}
	if part == "rest" {
		return variants[first:]
	}
	return variants[:first]
}
