package ai.lordba.demo.app

import ai.lordba.demo.R
import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.activity.enableEdgeToEdge
import androidx.annotation.DrawableRes
import androidx.annotation.StringRes
import androidx.compose.foundation.isSystemInDarkTheme
import androidx.compose.foundation.layout.padding
import androidx.compose.material3.Icon
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.NavigationBar
import androidx.compose.material3.NavigationBarItem
import androidx.compose.material3.Scaffold
import androidx.compose.material3.Text
import androidx.compose.material3.darkColorScheme
import androidx.compose.material3.lightColorScheme
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.res.painterResource
import androidx.compose.ui.res.stringResource
import androidx.lifecycle.viewmodel.compose.viewModel

class MainActivity : ComponentActivity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        enableEdgeToEdge()
        super.onCreate(savedInstanceState)
        setContent {
            MaterialTheme(colorScheme = if (isSystemInDarkTheme()) darkColorScheme() else lightColorScheme()) { Demo() }
        }
    }
}

private enum class Screen(
    @param:StringRes val title: Int,
    @param:DrawableRes val icon: Int,
) {
    MODELS(R.string.models, R.drawable.ic_models),
    CHAT(R.string.chat, R.drawable.ic_chat),
    FINE_TUNE(R.string.fine_tune, R.drawable.ic_tune),
    LATENCY(R.string.latency, R.drawable.ic_latency),
}

/** The four screens. Their view models are made here, so that one goes on while another is shown. */
@Composable
private fun Demo() {
    val models: ModelsViewModel = viewModel(factory = ViewModels)
    val chat: ChatViewModel = viewModel(factory = ViewModels)
    val fineTune: FineTuneViewModel = viewModel(factory = ViewModels)
    val latency: LatencyViewModel = viewModel(factory = ViewModels)
    var screen by rememberSaveable { mutableStateOf(Screen.MODELS) }
    Scaffold(
        bottomBar = {
            NavigationBar {
                Screen.entries.forEach {
                    NavigationBarItem(
                        selected = it == screen,
                        onClick = { screen = it },
                        icon = { Icon(painterResource(it.icon), contentDescription = null) },
                        label = { Text(stringResource(it.title)) },
                    )
                }
            }
        },
    ) { inner ->
        val modifier = Modifier.padding(inner)
        when (screen) {
            Screen.MODELS -> ModelsScreen(models, modifier)
            Screen.CHAT -> ChatScreen(chat, modifier)
            Screen.FINE_TUNE -> FineTuneScreen(fineTune, modifier)
            Screen.LATENCY -> LatencyScreen(latency, modifier)
        }
    }
}
