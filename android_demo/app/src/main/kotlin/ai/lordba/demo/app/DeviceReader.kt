package ai.lordba.demo.app

import ai.lordba.demo.core.Device
import ai.lordba.demo.core.jsonObject
import android.app.ActivityManager
import android.content.Context
import android.os.Build
import com.google.gson.JsonObject

/** What the profile file says of the phone. */
class DeviceReader(
    private val context: Context,
) {
    fun device(): Device {
        val memory = ActivityManager.MemoryInfo()
        (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(memory)
        return Device(
            device = "${Build.MANUFACTURER} ${Build.MODEL}",
            arch = Build.SUPPORTED_ABIS.first(),
            os = "Android ${Build.VERSION.RELEASE}",
            totalMem = memory.totalMem,
            availMem = memory.availMem,
        )
    }

    fun machine(): JsonObject =
        jsonObject(
            "cpu" to Build.HARDWARE,
            "cores" to Runtime.getRuntime().availableProcessors(),
        )
}
