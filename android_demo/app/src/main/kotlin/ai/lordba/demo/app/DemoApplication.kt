package ai.lordba.demo.app

import android.app.Application

/** Holds what lives as long as the process. */
class DemoApplication : Application() {
    val services by lazy { Services(this) }
}
