package ai.lordba.demo.checks

import org.junit.runner.Description
import org.junit.runner.JUnitCore
import org.junit.runner.notification.Failure
import org.junit.runner.notification.RunListener
import kotlin.system.exitProcess

/** Runs the test classes named on the command line and ends with a line "N passed, N failed". */
fun main(names: Array<String>) {
    val core = JUnitCore()
    var skipped = 0
    core.addListener(
        object : RunListener() {
            override fun testFailure(failure: Failure) =
                println("FAILED ${failure.description}\n${failure.trimmedTrace}")

            override fun testAssumptionFailure(failure: Failure) {
                skipped++
                println("skipped ${failure.description}: ${failure.message}")
            }

            override fun testIgnored(description: Description) {
                skipped++
                println("skipped $description")
            }
        },
    )
    val result = core.run(*names.map { Class.forName(it) }.toTypedArray())
    val ran = result.runCount - (skipped - result.ignoreCount)
    println("$skipped skipped, ${result.runTime} ms")
    println("${ran - result.failureCount} passed, ${result.failureCount} failed")
    exitProcess(if (result.wasSuccessful() && ran > 0) 0 else 1)
}
