package ai.lordba.demo.app

import ai.lordba.demo.core.BundleStore
import ai.lordba.demo.runtime.NativeRunners
import ai.lordba.demo.runtime.NativeTrainers
import android.content.Context
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import java.io.File

/** What all screens share. */
class Services(
    context: Context,
) {
    /** Where adb can push bundles to: Android/data/ai.lordba.demo/files/bundles. Null without external storage. */
    private val pushed: File? = context.getExternalFilesDir("bundles")
    val store = BundleStore(listOfNotNull(File(context.filesDir, "bundles"), pushed))
    val engine = Engine(NativeRunners, CoroutineScope(SupervisorJob() + Dispatchers.Default))
    val trainers = NativeTrainers
    val trainingFiles = File(context.noBackupFilesDir, "fine-tune")
    val draft = File(trainingFiles, "draft.txt")

    /** What the share sheet may hand out; see res/xml/shared_files.xml. */
    val profiles = File(context.cacheDir, "profiles")
    val device = DeviceReader(context)
}
