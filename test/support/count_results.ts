/** Sums vitest's JSON reports (paths as arguments): "N passed, N failed"; exits with 1 on any failure. */
import { readFileSync } from "node:fs";

interface Report {
  success: boolean;
  numPassedTests: number;
  numFailedTests: number;
  testResults: { status: string; assertionResults: unknown[] }[];
}

let passed = 0;
let failed = 0;
for (const path of process.argv.slice(2)) {
  let report: Report;
  try {
    report = JSON.parse(readFileSync(path, "utf8")) as Report;
  } catch {
    failed++; // a run that ended without a report
    continue;
  }
  // A file that does not even load has no tests to count.
  const unloaded = report.testResults
    .filter((file) => file.status === "failed" && file.assertionResults.length === 0).length;
  passed += report.numPassedTests;
  failed += report.numFailedTests + unloaded;
  if (!report.success && report.numFailedTests + unloaded === 0) failed++; // errors outside of any test
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed > 0 || passed === 0 ? 1 : 0;
